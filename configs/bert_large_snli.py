"""SNLI with BERT-large and the exits of Schwartz et al. (ACL 2020). Not yet run.

    python -m train --config configs/bert_large_snli.py --workdir runs/bert_large_snli

`:pod` behind the file's name takes 1152 rows per step, 36 on each of 32 chips, at the rate that
Adam scales by the square root of the batch.
"""

import dataclasses

from ejax.config import DataConfig, TrainConfig

config = TrainConfig(
    model="google-bert/bert-large-uncased",
    data=DataConfig(name="snli", max_length=128),
    layers=(1, 5, 13, 24),
    pooling="cls",
    distillation=0.0,
    epochs=2,
    batch_size=36,
    learning_rate=2e-5,
    train_embeddings=True,
    remat=True,
)
pod = dataclasses.replace(config, batch_size=1152, learning_rate=1.1e-4)
