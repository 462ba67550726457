"""How good an output is: metrics, comparisons, and pictures to look at."""
