"""Hugging Face's Trainer and one of its models on scikit-learn's digits, with one more callback.

python examples/hugging_face.py
"""

import argparse

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import layer_collapse as lc
from layer_collapse import data
from layer_collapse.integrations.hugging_face import Collapse


class Digits(Dataset):
    def __init__(self, split: data.Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.y)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.split.x[index], "labels": self.split.y[index]}


def main(rounds: int, epochs: int, folder: str) -> None:
    torch.manual_seed(0)
    digits = data.load("digits")
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=48,
        num_attention_heads=4,
        num_hidden_layers=4,
        intermediate_size=96,
        hidden_act="relu",
    )
    model = ViTForImageClassification(config)
    example = {"pixel_values": digits.train.x[:2]}
    collapse = Collapse(fraction=0.9, rounds=rounds, every=epochs, example_inputs=example)
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            num_train_epochs=(rounds + 1) * epochs,
            per_device_train_batch_size=64,
            learning_rate=2e-3,
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="epoch",
            save_total_limit=1,
            report_to="none",
        ),
        train_dataset=Digits(digits.train),
        callbacks=[collapse],
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "entropy/mean" in line]
    for round_, scalars in enumerate(logged[epochs - 1 :: epochs]):
        print(f"round {round_}", {name: round(value, 3) for name, value in scalars.items()})

    batches = [{"pixel_values": x} for x in digits.train.x.split(256)]
    report = lc.scan(model, batches, example)
    folded = lc.fold(lc.linearize(model, report, example).model, example).model
    with torch.no_grad():
        logits = folded(pixel_values=digits.test.x)["logits"]
    right = (logits.argmax(1) == digits.test.y).double().mean()
    print(f"{len(report.zero_entropy)} of {len(report)} rectifiers have gone; {right:.1%} right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--folder", default="runs/hugging_face", help="of logs and checkpoints")
    main(**vars(parser.parse_args()))
