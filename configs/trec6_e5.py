"""TREC question types with a 12-layer encoder and the paper's exits.

    python -m train --config configs/trec6_e5.py --workdir runs/e5 model=MODEL data.path=FOLDER

MODEL is any 12-layer BERT in Hugging Face's format, FOLDER holds train, dev and test files.

2 cores of an AMD EPYC, 2026-11-22: 11 minutes, beside other work, with a 12-layer development
model of width 384: full depth 0.828 on test, threshold 0.76 the same at a mean depth of 8.30.
"""

from ejax.config import DataConfig, TrainConfig

config = TrainConfig(
    model="intfloat/e5-small",
    data=DataConfig(path="trec6", max_length=64),
    layers=(1, 4, 6, 12),
    distillation=0.0,
    epochs=1,
    batch_size=32,
    learning_rate=1e-4,
)
