"""TREC question types, 6 classes, with MiniLM-L6.

    python -m train --config configs/trec6_minilm.py --workdir runs/trec6 data.path=FOLDER

FOLDER holds train, dev and test files.

2 cores of an AMD EPYC without native bfloat16, 2026-11-24: 6 minutes, beside other work; full depth
0.928 on test, the default thresholds give the same at a mean depth of 2.88 layers.
"""

from ejax.config import DataConfig, TrainConfig

config = TrainConfig(
    model="all-MiniLM-L6-v2",
    data=DataConfig(path="trec6", max_length=64),
    layers=(1, 2, 4, 6),
    distillation=0.0,
    epochs=2,
    batch_size=32,
    learning_rate=1e-4,
)
