"""Train a classifier with early exits on your files, then label new texts.

    python examples/train_and_predict.py DATA WORKDIR [field=value …]

DATA is a folder with train, dev and test files (csv, tsv or jsonl) with columns `label` and `text`.
Any field of `ejax.TrainConfig` can be set, such as `model=google-bert/bert-base-uncased epochs=3`.
"""

import sys

import ejax
from ejax.config import override

data, workdir, *fields = sys.argv[1:]
config = ejax.TrainConfig(
    model="all-MiniLM-L6-v2",  # a known name, a Hugging Face hub id, or a folder
    data=ejax.DataConfig(path=data),
    layers=(0, 1, 2, 4, 6),  # where the exits are; 0 is a linear model before the encoder
)
# Stopped, it resumes from its last checkpoint when the same command runs again.
folder = ejax.finetune(override(config, fields), workdir)

clf = ejax.EarlyExitClassifier.from_pretrained(folder)
texts = ["a film that is great", "the plot is poor, and so is the music"]
for text, answer in zip(texts, clf(texts), strict=True):
    print(f"{answer['label']} ({answer['score']:.2f}), exit {answer['exit_layer']}: {text}")

# Every exit's answer is calibrated, so one number trades accuracy for speed without training.
for threshold in (0.6, 0.9, 2.0):  # above 1 no text exits early
    layers = [answer["exit_layer"] for answer in clf(texts, threshold=threshold)]
    print(f"threshold {threshold}: exits after layers {layers}")
