"""Every rewrite gives the same function: in double precision to the last digits, in single to its noise."""

import copy
import functools
import statistics
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.artifact.sidecar import OutputSpec, Preprocessing
from exporter.errors import BadRequest
from exporter.graph import trace
from exporter.model import FORMS, forms
from exporter.model.convnext import ConvNeXt
from tests.conftest import tiny_architecture, tiny_state, trace_options

# Every published difference between two ConvNeXts.
DIFFERENCES = {
    "v1": {},
    "v2": {"grn": True, "layer_scale": False},
    "v1 without layer scale": {"layer_scale": False},
    "both": {"grn": True},
    "isotropic": {"depths": (2,), "dims": (32,), "patch": 16, "stem_norm": False},
    "overlap": {"stem": "overlap"},
    "overlap_tiered": {"stem": "overlap_tiered"},
    "overlap_act with simple norm": {"stem": "overlap_act", "norm": "simple"},
    "rms": {"norm": "rms", "grn": True},
    "norm before pooling": {"head_norm_first": True},
    "hidden layer in the head": {"head_layers": ("linear:40", "gelu")},
    "gelu_tanh and two eps": {"act": "gelu_tanh", "head_eps": 1e-2, "norm_eps": 1e-4},
    "silu after batch norm": {"act": "silu", "head_layers": ("affine:48", "linear:40", "silu")},
    "max pooling": {"pool": "max"},
    "both pools": {"pool": "catavgmax", "head_norm_first": True},
    "norm before max pooling": {"pool": "max", "head_norm_first": True},
    "stride 8": {"output_stride": 8},
    "patch 2": {"patch": 2, "stem_downsample": True, "kernels": (3, 5, 7, 9)},
    "three stages": {"depths": (1, 2, 1), "dims": (16, 24, 32), "act": "relu"},
    "norms of stages": {"stage_norms": (1, 3)},
    "no last norm": {"head_norm": False},
    "several heads": {"heads": ("color:5", "shape:3")},
    "projection": {"projection": True, "head_layers": ("linear:40", "gelu")},
    "all at the head": {"head_norm_first": True, "head_layers": ("linear:40", "gelu"), "norm_eps": 1e-3},
}
FOLDED = [form for form in FORMS if form != "plain"]


def network(task="classify", dtype=torch.float64, seed=0, spread=1.0, **differences):
    """A network whose scales, shifts and responses all differ from channel to channel."""
    model = ConvNeXt(tiny_architecture(**differences), 10)
    model.load_state_dict(tiny_state(seed, **differences))
    model = model.to(dtype).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1 and not name.endswith("bias"):
            tensor *= torch.exp(spread * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))).to(
                dtype
            )
    return model.select(OutputSpec(tasks=(task,)))


def images(size=64, count=2, seed=0, dtype=torch.float64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def answers(model, given):
    with torch.inference_mode():
        found = model(given)
    return found if isinstance(found, tuple) else (found,)


def worst(expected, found):
    """The largest difference, as a share of the spread of what was expected."""
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape
    return max(float((a - b).abs().max() / a.std()) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("task", ["classify", "embed", "features"])
@pytest.mark.parametrize("form", FOLDED)
@pytest.mark.parametrize("kind", DIFFERENCES)
def test_a_form_is_the_network_in_double_precision(kind, form, task):
    differences = DIFFERENCES[kind]
    model = network(task, **differences)
    expected = answers(model, images())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = dict(model.named_parameters())
    assert worst(expected, answers(forms.rewrite(model, form), images())) <= 1e-9
    assert all(torch.equal(held[name], weights[name]) for name in held), "the weights it was given were changed"


@given(
    kind=st.sampled_from(list(DIFFERENCES)),
    form=st.sampled_from(FOLDED),
    seed=st.integers(0, 1000),
    spread=st.floats(0, 2, allow_subnormal=False),
    size=st.sampled_from([32, 64, 96]),
    loud=st.floats(0.01, 100),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_it_is_so_whatever_the_weights_and_images(kind, form, seed, spread, size, loud):
    differences = DIFFERENCES[kind]
    given = loud * images(size, seed=seed)
    model = network(seed=seed, spread=spread, **differences)
    expected = answers(model, given)
    assert worst(expected, answers(forms.rewrite(model, form), given)) <= 1e-9


@functools.lru_cache(1)
def in_single_precision(kind):
    """Seven networks of a kind; of each its images, its answers in double precision and the error of eager."""
    cases = []
    for seed in range(7):
        batch = images(seed=seed, dtype=torch.float32)
        model = network(dtype=torch.float32, seed=seed, **DIFFERENCES[kind])
        truth = answers(copy.deepcopy(model).double(), batch.double())
        cases.append((model, batch, truth, worst(truth, answers(model, batch))))
    return cases


@pytest.mark.parametrize("form", FOLDED)
@pytest.mark.parametrize("kind", DIFFERENCES)
def test_in_single_precision_a_form_is_as_near_to_the_truth_as_eager(kind, form):
    eager, errors = [], []
    for model, batch, truth, error in in_single_precision(kind):
        eager.append(error)
        rewritten = forms.rewrite(copy.deepcopy(model), form)
        errors.append(worst(truth, answers(rewritten, batch)))
    assert min(eager) > 0
    assert statistics.median(errors) <= 2 * statistics.median(eager)


@pytest.mark.parametrize("kind", ["v1", "overlap", "overlap_tiered", "overlap_act with simple norm", "isotropic"])
@pytest.mark.parametrize("word", ["uint8", "float01", "normalized"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_pixels_as_they_are_give_what_normalised_ones_gave(kind, word, layout, color):
    """At the border too: around the image an overlapped stem sees the mean, not black."""
    recipe = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), input=word, layout=layout, color=color)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (recipe.mean, recipe.std))
    model = network(**DIFFERENCES[kind])
    normalized = (pixels.double() / 255 - mean) / std
    expected = answers(model, normalized)
    forms.take_input(model, recipe)
    taken = {"uint8": pixels, "float01": pixels.double() / 255, "normalized": normalized}[word]
    taken = taken.flip(1) if color == "BGR" else taken
    taken = taken.permute(0, 2, 3, 1).contiguous() if layout == "NHWC" else taken
    assert worst(expected, answers(model, taken)) <= 1e-9
    assert worst(expected, answers(forms.rewrite(model, "nchw"), taken)) <= 1e-9
    assert worst(expected, answers(model, taken.double() * 0.9)) > 1e-3, "the input matters"


def test_normalised_input_leaves_the_stem_alone():
    model = network()
    before = model.downsample_layers[0][0]
    forms.take_input(model, Preprocessing())
    assert model.downsample_layers[0][0] is before


def test_each_fold_alone_leaves_the_block_the_same():
    given = images(16, dtype=torch.float64)[:, :1].expand(-1, 16, -1, -1) + torch.arange(16.0).view(-1, 1, 1)
    for fold in (forms.fold_layer_scale, forms.fold_response):
        block = network(grn=True).stages[0][0]
        expected = answers(block, given)
        fold(block)
        assert worst(expected, answers(block, given)) <= 1e-12
    assert block.grn.beta.abs().max() == 0


def test_a_pointwise_layer_is_the_same_as_a_convolution():
    layer = network().stages[0][0].pwconv1
    given = images(8)[:, :1].expand(-1, 16, -1, -1) * torch.arange(1.0, 17).view(-1, 1, 1)
    expected = layer(given.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(forms.as_conv(layer)(given), expected, atol=1e-12)


def test_an_unknown_form_is_refused_with_the_nearest():
    with pytest.raises(BadRequest, match="unknown form 'nhcw'; did you mean 'nchw'"):
        forms.rewrite(network(), "nhcw")


def operators(form, **differences):
    model = forms.rewrite(network(dtype=torch.float32, **differences), form)
    return Counter(node.op_type for node in trace.trace(model, trace_options(imgsz=64)).graph)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_what_a_form_is_made_of(kind):
    """Five blocks, three downsampling layers, a stem and a head."""
    differences = DIFFERENCES[kind]
    plain, linear, conv, nchw = (operators(form, **differences) for form in FORMS)
    grn = kind == "v2"
    assert plain["MatMul"] == 10
    assert linear["MatMul"] == (15 if grn else 10), "with channels last GRN's sum of squares is a product"
    assert conv["MatMul"] == nchw["MatMul"] == 0
    assert conv["Conv"] == nchw["Conv"] == linear["Conv"] + 10
    assert linear["LayerNormalization"] == conv["LayerNormalization"] == 5 + 1 + 3 + 1
    assert nchw["LayerNormalization"] == 1, "that of the head, over a vector"
    assert nchw["Transpose"] == 0
    assert nchw["ReduceMean"] == conv["ReduceMean"] + 2 * 9
    assert conv["Mul"] == (10 if grn else 0), "no layer scale; of GRN γ·share and the product"
    squares = 5 if grn else 0
    assert linear["Mul"] == conv["Mul"] + squares
    assert plain["Mul"] + plain["Add"] >= linear["Mul"] - squares + linear["Add"] + 5
    assert conv["ReduceL2"] == nchw["ReduceL2"] == (5 if grn else 0)
    assert linear["ReduceL2"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_backbones_and_open_sizes_are_traced_in_every_form(form):
    model = forms.rewrite(network("features", dtype=torch.float32, grn=True), form)
    graph = trace.trace(model, trace_options(task="features", imgsz=None)).graph
    assert [str(dim) for dim in graph.inputs[0].shape] == ["batch", "3", "height", "width"]
    assert [value.name for value in graph.outputs] == ["stage1", "stage2", "stage3", "stage4"]


def test_bytes_are_the_type_of_the_graphs_input():
    model = network(dtype=torch.float32)
    forms.take_input(model, Preprocessing(input="uint8"))
    graph = trace.trace(model, trace_options(imgsz=64, dtype="uint8")).graph
    assert graph.inputs[0].dtype.numpy() == np.uint8
