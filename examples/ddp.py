"""DistributedDataParallel on scikit-learn's digits, uneven data and all.

torchrun --nproc-per-node 2 examples/ddp.py

With --folder runs/ddp it saves after every round and, started again by hand or by torchrun's
--max-restarts 3, goes on from the last: the result is the same.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import layer_collapse as lc
from layer_collapse import data, models


def main(rounds: int, epochs: int, folder: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    digits = data.load("digits")
    x, y = digits.train.x[rank::world], digits.train.y[rank::world]
    model = DistributedDataParallel(models.ResMLP((1, 8, 8), 10, width=64, hidden=64, blocks=4))
    tracker = lc.track(model)
    masks = lc.Masks(lc.candidate_weights(model, tracker.sites))
    optimizer = lc.MaskedSGD(model.parameters(), 0.05, momentum=0.9, masks=masks)
    checkpoints = lc.Checkpoints(folder, model, optimizer, masks) if folder else None
    warm_up = lambda: model(x[:2]).sum().backward()  # noqa: E731 - see Checkpoints.load
    start = checkpoints.load(warm_up=warm_up) or 0 if checkpoints else 0
    for round_ in range(start, rounds + 1):
        tracker.reset()
        for _ in range(epochs):
            for batch in torch.randperm(len(digits.train) // world).split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        scalars = tracker.scalars(dist.group.WORLD, masks)  # of all ranks
        if rank == 0:
            print(f"round {round_}", {name: round(value, 3) for name, value in scalars.items()})
        if round_ < rounds:
            report = tracker.entropy(dist.group.WORLD)
            lc.prune_round(model.module, masks, report, tracker.sites, fraction=0.9)
            masks.check_ranks()  # stops the run, with rank and tensor, if they differ
            if checkpoints:
                checkpoints.save(round_ + 1)
    tracker.remove()

    report = lc.scan(model.module, x.split(256), group=dist.group.WORLD)
    if rank == 0:
        folded = lc.fold(lc.linearize(model.module, report).model, x[:2]).model
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
    parser.add_argument("--folder", default="", help="for checkpoints")
    main(**vars(parser.parse_args()))
