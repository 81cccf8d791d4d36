"""SST-2 with a 12-layer encoder of width 384.

    python -m train --config configs/sst2_e5.py --workdir DIR model=MODEL data.path=FOLDER

MODEL is any 12-layer BERT in Hugging Face's format, FOLDER holds train, dev and test files.

2 cores of an Intel Xeon with AVX-512, 2026-11-25: 29 minutes, beside other work; full depth 0.874
on dev and 0.887 on test; the default thresholds give 0.882 on test at a mean depth of 5.52
layers. MiniLM-L6 (`sst2_minilm.py`) with exits is both better and faster here.
"""

from ejax.config import DataConfig, TrainConfig

config = TrainConfig(
    model="intfloat/e5-small",
    data=DataConfig(name="glue/sst2", max_length=128),
    layers=(1, 2, 3, 4, 6, 9, 12),
    distillation=1.0,
    epochs=1,
    batch_size=64,
    learning_rate=1.5e-4,
    train_embeddings=False,
    average_decay=0.998,
    evals=8,
)
