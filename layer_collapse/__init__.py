"""Networks with fewer layers: neuron entropy, magnitude pruning and exact folding for PyTorch.

    tracker = layer_collapse.track(model)            # counts signs while the model trains
    report = layer_collapse.scan(model, data)        # certifies which rectifiers are linear
    linear = layer_collapse.linearize(model, report)
    folded = layer_collapse.fold(linear.model, example_inputs).model

or all of it, around your own training loop: :func:`layer_collapse.collapse`.
"""

import torch  # noqa: F401 - loads the libraries that the native module links against

from . import removal
from .collapse import CollapseResult, Phase, collapse
from .graph import TraceError
from .measure.report import EntropyReport, RectifierEntropy
from .measure.scan import fingerprint, scan
from .measure.tracker import EntropyTracker, track
from .prune.masks import Masks
from .prune.optim import MaskedAdamW, MaskedSGD, keep_pruned
from .prune.rounds import CutError, Guards, candidate_weights, prune_round
from .prune.strategies import EntropyGuided, GlobalMagnitude, Strategy, UniformMagnitude
from .reduce.agreement import Agreement, agreement
from .reduce.approximate import Fit, fit_gates
from .reduce.blocks import BlockRemoval, remove_blocks
from .reduce.fold import FoldResult, fold
from .reduce.gate import AffineGate
from .reduce.linearize import Linearized, linearize
from .reduce.optimizer_state import TransferredState, transfer_optimizer_state
from .reduce.refresh import refresh_batch_norm
from .reduce.saving import load_folded, save_folded
from .resume.checkpoints import Checkpoints

__version__ = "0.1.0"

__all__ = [
    "AffineGate",
    "Agreement",
    "BlockRemoval",
    "Checkpoints",
    "CollapseResult",
    "CutError",
    "EntropyGuided",
    "EntropyReport",
    "EntropyTracker",
    "Fit",
    "FoldResult",
    "GlobalMagnitude",
    "Guards",
    "Linearized",
    "MaskedAdamW",
    "MaskedSGD",
    "Masks",
    "Phase",
    "RectifierEntropy",
    "Strategy",
    "TraceError",
    "TransferredState",
    "UniformMagnitude",
    "agreement",
    "candidate_weights",
    "collapse",
    "fingerprint",
    "fit_gates",
    "fold",
    "keep_pruned",
    "linearize",
    "load_folded",
    "prune_round",
    "refresh_batch_norm",
    "removal",
    "remove_blocks",
    "save_folded",
    "scan",
    "track",
    "transfer_optimizer_state",
]
