"""A 12-layer encoder of width 384 with exits that lie closer where most texts leave.

    python -m train --config configs/e5_small.py:sst2 --workdir runs/e5_small_sst2
    python -m train --config configs/e5_small.py:ag_news --workdir runs/e5_small_ag_news
    python -m train --config configs/e5_small.py:nsmc --workdir runs/e5_small_nsmc data.path=NSMC

Only nsmc was run with the current recipe.

`model=FOLDER` takes another 12-layer BERT, `data.path=FOLDER` local train, dev and test files. NSMC
is a folder with those of the Naver sentiment movie corpus, Korean, https://github.com/e9t/nsmc.
"""

import dataclasses

from ejax.config import DataConfig, TrainConfig

sst2 = TrainConfig(
    model="intfloat/e5-small",
    data=DataConfig(name="glue/sst2"),
    layers=(1, 2, 3, 4, 6, 9, 12),
    epochs=1,
    batch_size=64,
    learning_rate=1.5e-4,
    average_decay=0.998,
)
ag_news = dataclasses.replace(
    sst2, data=DataConfig(name="ag_news_subset", limit=8000), batch_size=32
)
nsmc = TrainConfig(  # of 250,037 pieces, Hangul among them
    model="intfloat/multilingual-e5-small", data=DataConfig(path="nsmc", limit=20_000),
    layers=(0, *sst2.layers),
)  # fmt: skip
