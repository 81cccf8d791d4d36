"""SST-2 with MiniLM-L6 and an exit after every layer.

    python -m train --config configs/sst2_minilm.py --workdir runs/sst2_minilm
    python -m train --config configs/sst2_minilm.py --workdir runs/sst2_minilm data.path=FOLDER

The second form reads FOLDER/{train,dev,test}.tsv.gz instead of the TFDS set.

2 cores of an AMD EPYC without native bfloat16, 2026-11-24: 23 minutes, beside other work; full
depth 0.8911 on dev, 0.8995 on test; the default thresholds give 0.8957 on test at a mean depth of
2.57 layers.
"""

from ejax.config import DataConfig, TrainConfig

config = TrainConfig(
    model="all-MiniLM-L6-v2",
    data=DataConfig(name="glue/sst2", max_length=128),
    layers=(1, 2, 3, 4, 5, 6),
    pooling="mean",
    distillation=1.0,
    epochs=1,
    batch_size=64,
    learning_rate=1.5e-4,
    train_embeddings=False,
    average_decay=0.998,
    evals_per_epoch=4,
)
