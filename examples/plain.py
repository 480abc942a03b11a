"""A plain loop on scikit-learn's digits: count, prune where it is used least, fold what is left.

python examples/plain.py
"""

import argparse

import torch
import torch.nn.functional as F

import layer_collapse as lc
from layer_collapse import data, models


def main(rounds: int, epochs: int) -> None:
    torch.manual_seed(0)
    digits = data.load("digits")
    model = models.ResMLP((1, 8, 8), 10, width=64, hidden=64, blocks=4)
    tracker = lc.track(model)
    masks = lc.Masks(lc.candidate_weights(model, tracker.sites))
    optimizer = lc.MaskedSGD(model.parameters(), 0.05, momentum=0.9, masks=masks)
    for round_ in range(rounds + 1):
        tracker.reset()
        for _ in range(epochs):
            for batch in torch.randperm(len(digits.train)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(digits.train.x[batch]), digits.train.y[batch]).backward()
                optimizer.step()
        scalars = tracker.scalars(masks=masks)
        print(f"round {round_}", {name: round(value, 3) for name, value in scalars.items()})
        if round_ < rounds:
            lc.prune_round(model, masks, tracker.entropy(), tracker.sites, fraction=0.9)
    tracker.remove()

    report = lc.scan(model, digits.train.x.split(256))
    folded = lc.fold(lc.linearize(model, report).model, digits.train.x[:2]).model
    with torch.no_grad():
        right = (folded(digits.test.x).argmax(1) == digits.test.y).double().mean()
    print(f"{len(report.zero_entropy)} of {len(report)} rectifiers have gone; {right:.1%} right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    main(**vars(parser.parse_args()))
