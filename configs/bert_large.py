"""BERT-large with the exits of Schwartz et al. (ACL 2020), on the paper's five data sets.

Not yet run.

    python -m train --config configs/bert_large.py:mnli --workdir runs/bert_large_mnli

The other data sets are ag_news, imdb, snli and sst2. `:mnli_pod` and its like take 1152 rows per
step, 36 on each of 32 chips, at the rate that Adam scales by the square root of the batch.
"""

import dataclasses

from ejax.config import DataConfig, TrainConfig


def on(name: str, max_length: int = 128) -> tuple[TrainConfig, TrainConfig]:
    """(one device, a pod of 32 chips) for a TFDS name."""
    config = TrainConfig(
        model="google-bert/bert-large-uncased",
        data=DataConfig(name=name, max_length=max_length),
        layers=(1, 5, 13, 24),
        pooling="cls",
        distillation=0.0,
        epochs=2,
        batch_size=36,
        learning_rate=2e-5,
        train_embeddings=True,
        remat=True,
    )
    return config, dataclasses.replace(config, batch_size=1152, learning_rate=1.1e-4)


ag_news, ag_news_pod = on("ag_news_subset")
imdb, imdb_pod = on("imdb_reviews", max_length=512)
mnli, mnli_pod = on("glue/mnli")
snli, snli_pod = on("snli")
sst2, sst2_pod = on("glue/sst2")
