"""SST-2 with MiniLM-L6 and an exit after every layer.

    python -m train --config configs/sst2_minilm.py --workdir runs/sst2_minilm
    python -m train --config configs/sst2_minilm.py --workdir runs/sst2_minilm data.path=FOLDER

The second form reads FOLDER/{train,dev,test}.tsv.gz instead of the TFDS set.
"""

from ejax.config import DataConfig, TrainConfig

config = TrainConfig(
    model="all-MiniLM-L6-v2",
    data=DataConfig(name="glue/sst2"),
    layers=(1, 2, 3, 4, 5, 6),
    epochs=2,
    batch_size=64,
    learning_rate=1.5e-4,
    average_decay=0.998,
)
