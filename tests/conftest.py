"""Small models on few cores: one thread each, or two test processes fight over every layer."""

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no fault of the code: no deadline, nothing said of slow generation.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
