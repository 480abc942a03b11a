"""What a saved graph may call: the only functions, methods and modules that loading knows.

A target outside these tables is refused when saving, and a file that names one is refused when
loading; nothing is ever imported or unpickled by name. To support another function, add its name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .gate import AffineGate, ConstantBias, FixedSize
from .layers import CONV
from .ring import RingConv

_OPERATOR = """add sub mul truediv floordiv mod matmul pow neg getitem eq ne lt le gt ge and_
    or_ not_ invert xor iadd isub imul itruediv"""
_TORCH = """abs add addcmul addmm amax amin arange argmax argmin baddbmm bmm bool cat ceil chunk
    clamp concat cos cumsum div einsum empty eq exp eye finfo flatten flip floor full full_like
    gather ge gt index_select isinf isnan le lerp log log1p logical_and logical_not logical_or
    logsumexp lt masked_fill matmul max maximum mean min minimum mul multiply narrow ne neg norm
    numel ones ones_like outer permute pow prelu prod reciprocal relu relu_ repeat_interleave
    reshape roll rsqrt select sigmoid sign sin softmax split sqrt square squeeze stack std sub
    sum swapaxes tanh tensor_split tile topk transpose tril triu true_divide unbind unflatten
    unsqueeze var where zeros zeros_like _assert"""
_FUNCTIONAL = """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d batch_norm celu channel_shuffle conv1d
    conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d dropout dropout2d elu
    embedding gelu glu group_norm hardsigmoid hardswish hardtanh instance_norm interpolate
    layer_norm leaky_relu leaky_relu_ linear log_softmax logsigmoid max_pool1d max_pool2d
    max_pool3d mish normalize one_hot pad pixel_shuffle pixel_unshuffle prelu relu relu6 relu_
    rms_norm scaled_dot_product_attention selu sigmoid silu softmax softplus tanh unfold
    upsample"""

_METHODS = """abs add add_ addmm all amax amin any argmax argmin bfloat16 bmm bool chunk clamp
    clamp_ clone contiguous cos cumsum detach dim div div_ double eq exp expand expand_as
    flatten flip float floor ge gt half index_select int le log long lt masked_fill masked_fill_
    matmul max mean min mul mul_ narrow ndimension ne neg norm numel permute pow prelu prod
    reciprocal relu relu_ repeat repeat_interleave reshape reshape_as roll rsqrt select sigmoid
    sin size softmax split sqrt square squeeze std stride sub sub_ sum swapaxes swapdims t tanh
    to topk transpose tril triu type_as unbind unflatten unsqueeze var view view_as where"""

#: Methods of a tensor (or a size) that a saved graph may call.
METHODS = frozenset(_METHODS.split())

#: Attributes that ``getattr`` may read in a saved graph.
ATTRIBUTES = frozenset(["shape", "ndim", "dtype", "device", "T", "mT", "min", "max"])


def _functions() -> dict[str, Any]:
    table: dict[str, Any] = {"getattr": getattr}
    for prefix, owner, names in (
        ("operator", operator, _OPERATOR),
        ("torch", torch, _TORCH),
        ("functional", F, _FUNCTIONAL),
    ):
        table |= {f"{prefix}.{n}": getattr(owner, n) for n in names.split()}
    return table


#: Functions by the name under which a file knows them.
FUNCTIONS: Mapping[str, Any] = _functions()
FUNCTION_NAMES: Mapping[Any, str] = {f: name for name, f in reversed(list(FUNCTIONS.items()))}

_CONV = """in_channels out_channels kernel_size stride padding dilation groups bias padding_mode"""
_MOST = 1000  # layers of a recurrent module
_PARTS = ("merged", "first", "second")  # of a RingConv, each a convolution


def _has(name: str) -> Callable[[nn.Module], bool]:
    def has(module: nn.Module) -> bool:
        value = getattr(module, name, None)
        return value is not None and value is not False  # recurrent modules have a flag instead

    return has


def _of_part(part: str, field: str) -> Callable[[nn.Module], Any]:
    read = _has(field) if field == "bias" else lambda conv: getattr(conv, field)
    return lambda module: read(module.get_submodule(part))


#: Constructor fields that are not attributes of the same name.
DERIVED: Mapping[str, Callable[[nn.Module], Any]] = {
    "bias": _has("bias"),
    "add_bias_kv": _has("bias_k"),
    "mha_bias": _has("in_proj_bias"),
    "channels": lambda module: module.scale.numel(),  # type: ignore[union-attr,operator]
    "value_shape": lambda module: list(module.value.shape),  # type: ignore[union-attr,arg-type]
    **{f"{part}_{field}": _of_part(part, field) for part in _PARTS for field in _CONV.split()},
}

_CONV_T = """in_channels out_channels kernel_size stride padding output_padding groups bias dilation
    padding_mode"""
_NORM = "num_features eps momentum affine track_running_stats"
_MAX_POOL = "kernel_size stride padding dilation return_indices ceil_mode"
_AVG_POOL_1D = "kernel_size stride padding ceil_mode count_include_pad"
_AVG_POOL = _AVG_POOL_1D + " divisor_override"
_RECURRENT = "input_size hidden_size num_layers bias batch_first dropout bidirectional"
_ATTENTION = """embed_dim num_heads dropout mha_bias add_bias_kv add_zero_attn kdim vdim
    batch_first"""

_FIELDS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "": (nn.Identity, nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink),
    "inplace": (nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish),
    "negative_slope inplace": (nn.LeakyReLU,),
    "num_parameters": (nn.PReLU,),
    "approximate": (nn.GELU,),
    "alpha inplace": (nn.ELU, nn.CELU),
    "beta threshold": (nn.Softplus,),
    "min_val max_val inplace": (nn.Hardtanh,),
    "dim": (nn.Softmax, nn.LogSoftmax, nn.GLU),
    "p inplace": (
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.AlphaDropout, nn.FeatureAlphaDropout),
    ),
    "start_dim end_dim": (nn.Flatten,),
    "dim unflattened_size": (nn.Unflatten,),
    "in_features out_features bias": (nn.Linear,),
    "in1_features in2_features out_features bias": (nn.Bilinear,),
    _CONV: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    _CONV_T: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    _NORM: (
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    ),
    "normalized_shape eps elementwise_affine bias": (nn.LayerNorm,),
    "normalized_shape eps elementwise_affine": (nn.RMSNorm,),
    "num_groups num_channels eps affine": (nn.GroupNorm,),
    "size alpha beta k": (nn.LocalResponseNorm,),
    "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq": (
        nn.Embedding,
    ),
    _MAX_POOL: (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    _AVG_POOL_1D: (nn.AvgPool1d,),
    _AVG_POOL: (nn.AvgPool2d, nn.AvgPool3d),
    "output_size": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    "output_size return_indices": (
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    ),
    "size scale_factor mode align_corners": (nn.Upsample,),
    "size scale_factor": (nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    "padding": (
        *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
        *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
        *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
        *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    ),
    "padding value": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "upscale_factor": (nn.PixelShuffle,),
    "downscale_factor": (nn.PixelUnshuffle,),
    "groups": (nn.ChannelShuffle,),
    _RECURRENT: (nn.GRU,),
    _RECURRENT + " nonlinearity": (nn.RNN,),
    _RECURRENT + " proj_size": (nn.LSTM,),
    _ATTENTION: (nn.MultiheadAttention,),
    "channels channel_dim": (AffineGate,),
    "value_shape": (ConstantBias,),
    "shape step batch": (FixedSize,),
    " ".join(f"{part}_{field}" for part in _PARTS for field in _CONV.split()): (RingConv,),
}

#: Module types by name, each with its constructor fields.
MODULES: Mapping[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    kind.__name__: (kind, tuple(fields.split()))
    for fields, kinds in _FIELDS.items()
    for kind in kinds
}


def _kinds() -> dict[str, tuple[str, ...]]:
    table = {
        "bool": """bias mha_bias inplace affine track_running_stats elementwise_affine ceil_mode
            return_indices count_include_pad add_bias_kv add_zero_attn batch_first
            scale_grad_by_freq bidirectional""",
        "int": """in_features out_features in1_features in2_features in_channels out_channels groups
            num_parameters num_features num_groups num_channels num_embeddings embedding_dim
            start_dim end_dim embed_dim num_heads kdim vdim upscale_factor downscale_factor channels
            channel_dim step input_size hidden_size proj_size""",
        "few": "num_layers",
        "float": "negative_slope alpha beta threshold min_val max_val p dropout k norm_type value",
        "sizes": "kernel_size dilation output_padding normalized_shape value_shape shape",
        "text": "approximate padding_mode mode nonlinearity",
        "none int": "dim padding_idx divisor_override batch",
        "none float": "eps momentum max_norm",
        "none sizes": "output_size size unflattened_size stride",
        "none sizes float": "scale_factor",
        "none bool": "align_corners",
        "sizes text": "padding",
    }
    found = {name: tuple(kinds.split()) for kinds, names in table.items() for name in names.split()}
    return found | {f"{part}_{name}": found[name] for part in _PARTS for name in _CONV.split()}


#: What each constructor field may hold.
FIELD_KINDS: Mapping[str, tuple[str, ...]] = _kinds()


def fits(field: str, value: Any) -> bool:
    """Whether a value is of a sort that a constructor field may hold."""
    checks: Mapping[str, Callable[[Any], bool]] = {
        "none": lambda v: v is None,
        "bool": lambda v: type(v) is bool,
        "int": lambda v: type(v) is int,
        "few": lambda v: type(v) is int and 0 < v <= _MOST,  # the constructor makes each of them
        "float": lambda v: type(v) in (int, float),
        "text": lambda v: type(v) is str,
        "sizes": lambda v: (
            type(v) is int
            or (type(v) in (tuple, list) and all(s is None or type(s) is int for s in v))
        ),
    }
    return any(checks[kind](value) for kind in FIELD_KINDS[field])


def build(name: str, fields: Mapping[str, Any]) -> nn.Module:
    """A module of a registered type on the meta device, where nothing is allocated.

    Raises:
        Exception: whatever its constructor says to fields that do not fit.
    """
    kind, _ = MODULES[name]
    with torch.device("meta"):
        if kind is AffineGate:
            channels = fields["channels"]
            return AffineGate(torch.ones(channels), torch.zeros(channels), fields["channel_dim"])
        if kind is ConstantBias:
            return ConstantBias(torch.zeros(fields["value_shape"]))
        if kind is RingConv:
            return RingConv(*(_part(part, fields) for part in _PARTS))
        given = {("bias" if key == "mha_bias" else key): value for key, value in fields.items()}
        return kind(**given)


def _part(part: str, fields: Mapping[str, Any]) -> nn.Module:
    given = {name: fields[f"{part}_{name}"] for name in _CONV.split()}
    return CONV[len(given["kernel_size"]) - 1](**given)
