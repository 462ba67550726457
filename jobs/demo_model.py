"""How to make the package's own matcher, `demo`: scenes rendered, and `vecmill train` on its recipe.

    python -m jobs.demo_model FOLDER     # FOLDER/model is what pipelines/encoders/demo is of

Its scenes are of other seeds than those of `vecmill demo` and of the tests. With torch 2.15, on one thread of a CPU
with AVX-512, the folder comes out byte for byte, also if the command was killed and run again; elsewhere it may be
rounded otherwise.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jobs.demo import once
from jobs.train import train
from pipelines.scenes import write_shards

RECIPE = Path(__file__).parent / "recipes" / "training" / "demo.yaml"
SCENES, SHARDS, SEED = 16_000, 16, 101
VAL_SCENES, VAL_SEED = 1_000, 102


def main(folder: Path) -> None:
    once(folder / "scenes", lambda fresh: write_shards(fresh, SCENES, SHARDS, SEED, broken=0, twins=True))
    once(folder / "val", lambda fresh: write_shards(fresh, VAL_SCENES, 1, VAL_SEED, broken=0))
    train(
        str(RECIPE),
        output=str(folder),
        set=[f"input={folder / 'scenes'}", f"data.val_input={folder / 'val'}"],
        epochs=None,
        workers=None,
        address=None,
        dry_run=False,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
