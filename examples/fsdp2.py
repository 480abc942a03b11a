"""FSDP2 (fully_shard) on scikit-learn's digits, with a checkpoint that any number of ranks loads.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import argparse

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import layer_collapse as lc
from layer_collapse import data, models


def build() -> models.ResMLP:
    torch.manual_seed(0)
    return models.ResMLP((1, 8, 8), 10, width=64, hidden=64, blocks=4)


def main(rounds: int, epochs: int, checkpoint: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    digits = data.load("digits")
    even = len(digits.train) // world  # every forward is a collective: equally many on all ranks
    x, y = digits.train.x[rank::world][:even], digits.train.y[rank::world][:even]
    model = build()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    tracker = lc.track(model)
    masks = lc.Masks(lc.candidate_weights(model, tracker.sites))
    optimizer = lc.MaskedSGD(model.parameters(), 0.05, momentum=0.9, masks=masks)
    for round_ in range(rounds + 1):
        tracker.reset()
        for _ in range(epochs):
            for batch in torch.randperm(even).split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        scalars = tracker.scalars(dist.group.WORLD, masks)  # of all ranks
        if rank == 0:
            print(f"round {round_}", {name: round(value, 3) for name, value in scalars.items()})
        if round_ < rounds:
            report = tracker.entropy(dist.group.WORLD)
            lc.prune_round(model, masks, report, tracker.sites, fraction=0.9)
    tracker.remove()
    if checkpoint:
        weights = get_model_state_dict(model)
        state = get_optimizer_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state, "masks": masks}, checkpoint_id=checkpoint)

    report = lc.scan(model, x.split(256), group=dist.group.WORLD)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        plain = build()
        plain.load_state_dict(whole)
        folded = lc.fold(lc.linearize(plain, report).model, x[:2]).model
        with torch.no_grad():
            right = (folded(digits.test.x).argmax(1) == digits.test.y).double().mean()
        print(
            f"{len(report.zero_entropy)} of {len(report)} rectifiers have gone; {right:.1%} right"
        )
    dist.barrier()  # rank 0 has more to do; all leave together
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--checkpoint", default="", help="folder to save to")
    main(**vars(parser.parse_args()))
