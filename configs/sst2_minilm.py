"""SST-2 with MiniLM-L6 and an exit after every layer.

    python -m train --config configs/sst2_minilm.py --workdir runs/sst2_minilm
    python -m train --config configs/sst2_minilm.py --workdir runs/sst2_minilm data.path=FOLDER

The second form reads FOLDER/{train,dev,test}.tsv.gz instead of the TFDS set.

2 cores of an Intel Xeon with AVX-512, 2026-11-25: 22 minutes; full depth 0.8899 on dev, 0.8973 on
test; the default thresholds give 0.8946 on test at a mean depth of 2.27 layers. One epoch gave
0.876 and 0.877 on dev, and 0.891 with other draws of dropout on another machine.
"""

from ejax.config import DataConfig, TrainConfig

config = TrainConfig(
    model="all-MiniLM-L6-v2",
    data=DataConfig(name="glue/sst2", max_length=128),
    layers=(1, 2, 3, 4, 5, 6),
    pooling="mean",
    distillation=1.0,
    epochs=2,
    batch_size=64,
    learning_rate=1.5e-4,
    train_embeddings=False,
    average_decay=0.998,
    evals_per_epoch=4,
)
