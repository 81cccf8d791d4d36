"""SST-2 with BERT-base and the exits of Schwartz et al. (ACL 2020). Not yet run.

    python -m train --config configs/bert_base_sst2.py --workdir runs/bert_base_sst2

`:pod` behind the file's name takes 2304 rows per step, 72 on each of 32 chips, at the rate that
Adam scales by the square root of the batch.
"""

import dataclasses

from ejax.config import DataConfig, TrainConfig

config = TrainConfig(
    model="google-bert/bert-base-uncased",
    data=DataConfig(name="glue/sst2", max_length=128),
    layers=(1, 4, 6, 12),
    pooling="cls",
    distillation=0.0,
    epochs=2,
    batch_size=72,
    learning_rate=2e-5,
    train_embeddings=True,
)
pod = dataclasses.replace(config, batch_size=2304, learning_rate=1.1e-4)
