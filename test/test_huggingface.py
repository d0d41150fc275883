"""Models of the package transformers, shrunken, with random weights: nobody here wrote them.

Attention comes eager and as `scaled_dot_product_attention`; both are compared with one dense
reference, by hooks and plain autograd.
"""

import pickle
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from models import Problem
from oracle import (
    close,
    factors_of,
    ggn_blocks,
    is_layer,
    kronecker_block,
    layer_calls,
    normal_forms,
    normal_outputs,
    output_hessian,
    per_sample_grads,
)
from others import without_torchvision
from torch import Tensor, nn

from backpack_ext import (
    KFAC,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    HesScale,
    RecordingError,
    UnsupportedError,
    attach_loss,
    backpack,
    extend,
    register_rule,
)
from backpack_ext.rules import RULES, ElementwiseRule, base
from curvature import Axes, DenseBlock, DiagonalBlock, Kronecker, KroneckerSum

with without_torchvision():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()  # it warns of what it does without torchvision
    # modules are imported when their classes are asked for
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        BertConfig,
        BertForMaskedLM,
        ConvNextConfig,
        ConvNextForImageClassification,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
        ResNetConfig,
        ResNetForImageClassification,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )
    from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.pytorch_utils import Conv1D

N, T, V, D, CLASSES = 3, 5, 19, 8, 4
LAYER_SIZES = {"hidden_size": D, "num_hidden_layers": 2, "intermediate_size": 12}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(**options) -> nn.Module:
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    sizes = {"vocab_size": V, "n_positions": 7, "n_embd": D, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **TOKENS, **options))


def bert(**options) -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"vocab_size": V, "max_position_embeddings": 7, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**LAYER_SIZES, **sizes, **dropout, **TOKENS, **options))


def llama(**options) -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": V, "max_position_embeddings": 7}
    return LlamaForCausalLM(LlamaConfig(**LAYER_SIZES, **heads, **sizes, **TOKENS, **options))


def vit(**options) -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    images = {"image_size": 8, "patch_size": 4, "num_channels": 2, "num_labels": CLASSES}
    sizes = {**LAYER_SIZES, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, **images, **dropout, **options))


STAGES = {"num_channels": 2, "hidden_sizes": [6, 8], "depths": [1, 1], "num_labels": CLASSES}


def convnext() -> nn.Module:
    return ConvNextForImageClassification(ConvNextConfig(patch_size=2, num_stages=2, **STAGES))


def resnet(layer_type: str = "basic") -> nn.Module:
    config = ResNetConfig(embedding_size=6, layer_type=layer_type, **STAGES)
    return ResNetForImageClassification(config)


LANGUAGE = {"gpt2": gpt2, "bert": bert, "llama": llama}
BUILD: dict[str, Callable[..., nn.Module]] = {
    **LANGUAGE,
    "vit": vit,
    "convnext": convnext,
    "resnet": resnet,
}
ATTENTION = {"gpt2", "bert", "llama", "vit"}
CASES = [
    *((name, how) for name in BUILD if name in ATTENTION for how in ("eager", "sdpa")),
    ("convnext", None),
    ("resnet", None),
]
# embeddings that are the output head, too
TIED = {"gpt2": "transformer.wte.weight", "bert": "bert.embeddings.word_embeddings.weight"}
# These have float32 in their forward, whatever the model's data type: norms, rotations, softmax.
SINGLE = {("llama", "eager"), ("llama", "sdpa"), ("vit", "eager")}

every_case = pytest.mark.parametrize("name, attention", CASES)
every_model = pytest.mark.parametrize("name", BUILD)
every_language_model = pytest.mark.parametrize("name", LANGUAGE)


@dataclass
class Case(Problem):
    """A problem, and how its model computes attention."""

    attention: str | None = None


def agree(problem: Case, actual: Tensor, expected: Tensor) -> None:
    """Compare, as closely as a model computes.

    What vanishes but for rounding errors (gradients of a key's bias) is compared in the scale of
    ordinary gradients.
    """
    tolerance = 1e-5 if (problem.name, problem.attention) in SINGLE else 1e-10
    scale = expected.abs().max().clamp_min(0.01).item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def randomize(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value that leaves a trace.

    The packages' own initial values are tiny, or zero, or one.
    """
    for p in model.parameters():
        p.data.normal_(std=0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
    for module in model.modules():
        if "Norm" in type(module).__name__ and hasattr(module, "weight"):
            module.weight.data.uniform_(0.5, 1.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def token_logits(output) -> Tensor:
    """The logits of a language model, `[N T, V]`."""
    return output.logits.flatten(0, 1)


def image_logits(output) -> Tensor:
    return output.logits


def build(name: str, attention: str | None = "sdpa", reduction: str = "mean") -> Case:
    """A model with data, in float64; the same numbers for each kind of attention."""
    attention = attention if name in ATTENTION else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {} if attention is None else {"attn_implementation": attention}
        model = randomize(BUILD[name](**options))
        loss_fn = nn.CrossEntropyLoss(reduction=reduction)
        if name in LANGUAGE:
            x, target, readout = torch.randint(V, (N, T)), torch.randint(V, (N, T)), token_logits
            target[0, 3:] = target[1, 0] = -100
        else:
            x, target, readout = torch.randn(N, 2, 8, 8), torch.randint(CLASSES, (N,)), image_logits
    case = Case(model, (x,), loss_fn, target.flatten(), {}, readout, name, attention)
    return case.to(torch.float64)


# where KFAC saves to, by its kind
FIELDS = {"expand": "kfac_expand", "reduce": "kfac_reduce"}


def kfacs() -> list[KFAC]:
    return [KFAC(approx, "exact", savefield=field) for approx, field in FIELDS.items()]


def run(problem: Case, *more) -> Case:
    """Extend a problem and do one backward pass with all extensions."""
    extend(problem.model), extend(problem.loss_fn)
    with backpack(BatchGrad(), BatchL2Grad(), DiagGGN(), *kfacs(), *more):
        problem.loss().backward()
    return problem


@cache
def computed(name: str, attention: str | None) -> Case:
    return run(build(name, attention))


@cache
def reference(name: str) -> Case:
    """The problem, never extended."""
    return build(name)


@cache
def reference_forms(name: str) -> tuple[dict, Tensor]:
    """Normal forms of all layers and the Hessian of the loss."""
    return normal_forms(reference(name)), output_hessian(reference(name))


@cache
def reference_blocks(name: str) -> dict[str, Tensor]:
    """The exact GGN block of each parameter."""
    return ggn_blocks(reference(name))


def same_results(one: nn.Module, other: nn.Module, tolerance: float = 1e-10) -> None:
    """Compare all quantities of two models; what is zero but for rounding (keys' biases) is noise."""
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        found = [(getattr(p, f), getattr(q, f)) for f in ("grad", "grad_batch", "diag_ggn_exact")]
        blocks = ((getattr(p, f).to_dense(), getattr(q, f).to_dense()) for f in FIELDS.values())
        for x, y in (*found, *blocks):
            if max(x.abs().max(), y.abs().max()) > 1e-25:
                close(x, y, tolerance)


# -- all quantities of all models ------------------------------------------------------------------


@every_case
def test_gradient_is_untouched(name, attention):
    problem, plain = computed(name, attention), build(name, attention)
    plain.loss().backward()
    for p, q in zip(problem.model.parameters(), plain.model.parameters(), strict=True):
        agree(problem, p.grad, q.grad)


@every_case
def test_every_parameter_has_a_block(name, attention):
    """Layers have Kronecker products, a tied weight their sum, all else a dense block."""
    model = computed(name, attention).model
    layers = (nn.Linear, nn.Conv2d, nn.Embedding, Conv1D)  # Conv1D has no rule: a matrix product
    affine = [m for m in model.modules() if isinstance(m, layers)]
    roles = [id(p) for m in affine for p in m.parameters(recurse=False)]
    for key, p in model.named_parameters():
        kind = DenseBlock if id(p) not in roles else Kronecker
        if p.dim() > 1 and roles.count(id(p)) > 1:
            assert name in TIED and p is model.get_parameter(TIED[name])
            kind = KroneckerSum
        for field in FIELDS.values():
            assert type(getattr(p, field)) is kind, key


@every_case
def test_per_sample_gradients(name, attention):
    G, problem = per_sample_grads(reference(name)), computed(name, attention)
    for key, p in problem.model.named_parameters():
        agree(problem, p.grad_batch, G[key])
        agree(problem, p.batch_l2, G[key].square().flatten(1).sum(1))


@every_case
def test_ggn_diagonal_and_dense_blocks(name, attention):
    blocks, problem = reference_blocks(name), computed(name, attention)
    for key, p in problem.model.named_parameters():
        agree(problem, p.diag_ggn_exact.flatten(), blocks[key].diagonal())
        for field in FIELDS.values():
            if isinstance(getattr(p, field), DenseBlock):
                agree(problem, getattr(p, field).to_dense(), blocks[key])


@every_model
def test_hessian_diagonals(name):
    """No operation is unknown; both kinds of attention agree; those of each datum add up."""
    found = []
    for attention in ("eager", "sdpa") if name in ATTENTION else (None,):
        problem = build(name, attention)
        extend(problem.model), extend(problem.loss_fn)
        exts = HesScale(on_curved_glue="raise"), HesScale(batch=True), HesScale(gauss_newton=True)
        with warnings.catch_warnings(), backpack(*exts):
            warnings.simplefilter("error", UserWarning)
            problem.loss().backward()
        found.append({})
        for key, p in problem.model.named_parameters():
            torch.testing.assert_close(p.hesscale_batch.sum(0), p.hesscale, rtol=1e-8, atol=1e-10)
            found[-1][key] = p.hesscale, p.hesscale_gn
    tolerance = 1e-5 if (name, "eager") in SINGLE else 1e-10
    for key, pair in found[0].items():
        for one, other in zip(pair, found[-1][key], strict=True):
            scale = one.abs().max().clamp_min(0.01).item()
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def term(parameter: nn.Parameter, field: str, module: nn.Module) -> Kronecker:
    """The Kronecker product of a parameter, of its role in `module` if it has several."""
    found = getattr(parameter, field)
    if isinstance(found, KroneckerSum):
        diagonal = isinstance(module, nn.Embedding)
        (found,) = [t for t in found if (t.A.dim() == 1) == diagonal]
    return found


def check_factors(problem: Case, layers: type | tuple = (nn.Linear, nn.Conv2d, nn.Embedding)) -> int:
    """Compare the factors of all layers with the dense definitions; return their number."""
    forms, H = reference_forms(problem.name)
    count = 0
    for path, module in problem.model.named_modules():
        if not isinstance(module, layers):
            continue
        count += 1
        for approx, field in FIELDS.items():
            B, A = factors_of(*forms[path], H, approx)
            K = term(module.weight, field, module)
            agree(problem, K.B, B)
            agree(problem, K.A, A.diagonal() if isinstance(module, nn.Embedding) else A)
            if getattr(module, "bias", None) is not None and not isinstance(
                getattr(module.bias, field), DenseBlock
            ):
                agree(problem, getattr(module.bias, field).B, B)
    return count


@every_case
def test_exact_factors(name, attention):
    layers = {"gpt2": 3, "bert": 17, "llama": 16, "vit": 14, "convnext": 9, "resnet": 7}
    assert check_factors(computed(name, attention)) == layers[name]


# -- losses inside, padding, caches, checkpoints, copies -------------------------------------------


def shifted(target: Tensor) -> Tensor:
    """What causal models compare the logits of each position with: the next position's label."""
    return nn.functional.pad(target, (0, 1), value=-100)[:, 1:]


@every_language_model
def test_loss_computed_inside(name):
    """With `labels=` a model computes the loss; `attach_loss` says which one it is."""
    inside, outside = build(name), build(name)
    labels = inside.target.view(N, T)
    outside.target = (labels if name == "bert" else shifted(labels)).flatten()
    run(outside)
    extend(inside.model)
    with backpack(BatchGrad(), DiagGGN(), *kfacs()):
        output = inside.model(*inside.inputs, labels=labels)
        attach_loss(nn.CrossEntropyLoss(), token_logits(output), outside.target, output.loss)
        output.loss.backward()
    same_results(inside.model, outside.model, 1e-6)


def test_loss_computed_inside_without_attaching():
    case = build("gpt2")
    extend(case.model)
    with pytest.raises(RecordingError, match="attach_loss"), backpack(KFAC()):
        case.model(*case.inputs, labels=case.inputs[0]).loss.backward()
    case.model.zero_grad()
    with backpack(BatchL2Grad()):  # needs no loss but the gradient
        case.model(*case.inputs, labels=case.inputs[0]).loss.backward()
    assert all(p.batch_l2.shape == (N,) for p in case.model.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@every_language_model
def test_padded_sequences(name, attention):
    """Per-sample gradients and the GGN diagonal are those of each sequence alone, unpadded."""
    case, lengths = build(name, attention, "sum"), [3, 5, 4]
    mask = torch.tensor([[t < length for t in range(T)] for length in lengths])
    case.kwargs = {"attention_mask": mask.long()}
    case.target = case.target.view(N, T).masked_fill(~mask, -100).flatten()
    run(case)
    diag = [0.0] * len(list(case.model.parameters()))
    for n, length in enumerate(lengths):
        alone = build(name, attention, "sum")
        alone.inputs = (case.inputs[0][n : n + 1, :length],)
        alone.target = case.target.view(N, T)[n, :length]
        run(alone)
        for k, (p, q) in enumerate(zip(case.model.parameters(), alone.model.parameters(), strict=True)):
            agree(case, p.grad_batch[n], q.grad)
            diag[k] = diag[k] + q.diag_ggn_exact
    for p, d in zip(case.model.parameters(), diag, strict=True):
        agree(case, p.diag_ggn_exact, d)


@pytest.mark.parametrize(
    "options", [{}, {"return_dict": False}, {"output_hidden_states": True}], ids=str
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_outputs_of_other_kinds(name, options):
    """A cache of keys and values by default, tuples, hidden states; generation in between."""
    case = build(name)
    case.kwargs = options
    case.readout = lambda output: output[0].flatten(0, 1)
    output = case.model(*case.inputs, **options)
    assert (output[1] if isinstance(output, tuple) else output.past_key_values) is not None
    run(case)
    case.model.generate(case.inputs[0], max_new_tokens=2, do_sample=False, pad_token_id=0)
    same_results(case.model, computed(name, "sdpa").model)


@pytest.mark.parametrize("name", [*LANGUAGE, "vit"])  # the others have none
def test_activation_checkpointing(name):
    case = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its new name
        case.model.gradient_checkpointing_enable({"use_reentrant": False})
    case.model.train()
    run(case)
    same_results(case.model, computed(name, "sdpa").model)


@every_model
def test_copies_and_pickles(name):
    case = build(name)
    extend(case.model)
    case.model = deepcopy(pickle.loads(pickle.dumps(case.model)))
    with backpack(BatchGrad(), DiagGGN(), *kfacs()):
        extend(case.loss_fn)(case.forward(), case.target).backward()
    same_results(case.model, computed(name, "sdpa" if name in ATTENTION else None).model)


# -- rules for classes of their own ----------------------------------------------------------------


@contextmanager
def rules_restored():
    """Forget afterwards what was registered."""
    before = dict(RULES)
    try:
        yield
    finally:
        RULES.clear()
        RULES.update(before)
        base._lookup.clear()


def test_conv1d_with_a_rule():
    """GPT-2's Conv1D computes `x @ W + b`. Without a rule its products are found in the graph."""
    without = computed("gpt2", "sdpa").model
    names = [k for k, m in without.named_modules() if isinstance(m, Conv1D)]
    assert len(names) == 8 and is_layer(without.get_submodule(names[0]))
    with rules_restored():

        @register_rule(Conv1D)
        class Conv1DRule(type(RULES[nn.Linear])):
            def weight_axes(self, module):
                return Axes("i o -> 1 o i")

        case = run(build("gpt2"))
    assert check_factors(case, (nn.Linear, nn.Embedding, Conv1D)) == 3 + 8
    forms, H = reference_forms("gpt2")
    for path in names:
        module, plain = case.model.get_submodule(path), without.get_submodule(path)
        for approx, field in FIELDS.items():
            K = getattr(module.weight, field)
            found = getattr(plain.weight, field)
            assert isinstance(K, Kronecker) and isinstance(found, Kronecker)
            expected = kronecker_block(module, *factors_of(*forms[path], H, approx))
            agree(case, K.to_dense(), expected)
            agree(case, found.to_dense(), expected)
        agree(case, module.weight.grad_batch, plain.weight.grad_batch)
        agree(case, module.weight.diag_ggn_exact, plain.weight.diag_ggn_exact)
        # expand differs where positions interact, reduce's block of the bias is always exact
        agree(case, module.bias.kfac_reduce.to_dense(), reference_blocks("gpt2")[f"{path}.bias"])


def test_rmsnorm_with_a_rule():
    """Llama's norm is a class of its own; with a rule it costs less, and gives the same."""
    with rules_restored():

        @register_rule(LlamaRMSNorm)
        class LlamaRMSNormRule(ElementwiseRule):
            bias = None

            def normalized(self, site, x):
                x = x.float()  # it computes in float32, whatever comes in
                eps = site.module.variance_epsilon
                return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(site.x.dtype)

        case = build("llama")
        diagonal = KFAC(fisher="exact", norm="diagonal", savefield="kfac_diagonal")
        run(case, diagonal)
    blocks = reference_blocks("llama")
    norms = [k for k, m in case.model.named_modules() if isinstance(m, LlamaRMSNorm)]
    assert len(norms) == 5
    same_results(case.model, computed("llama", "sdpa").model, 1e-5)
    for path in norms:
        weight = case.model.get_submodule(path).weight
        agree(case, weight.kfac_expand.to_dense(), blocks[f"{path}.weight"])
        assert isinstance(weight.kfac_diagonal, DiagonalBlock)
        agree(case, weight.kfac_diagonal.diagonal(), blocks[f"{path}.weight"].diagonal())


# Positions that other arguments decide, or that all data share: T5's are [6, 6], which looks like 3
# data with twelve each.
OTHERS = {
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=V,
            hidden_size=D,
            word_embed_proj_dim=D,
            num_hidden_layers=1,
            ffn_dim=12,
            num_attention_heads=2,
            max_position_embeddings=7,
        )
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=V,
            d_model=D,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=12,
            decoder_ffn_dim=12,
            max_position_embeddings=7,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=V, d_model=D, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=V, num_attention_heads=2, num_key_value_heads=1, head_dim=4, **LAYER_SIZES
        )
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_with_a_forward_of_their_own(name):
    """Per-sample gradients of all parameters; where a rule's forward was changed, a rule says how."""
    torch.manual_seed(0)
    model, x = randomize(OTHERS[name]()).double(), torch.randint(3, V, (N, 6))
    extra = {"decoder_input_ids": x.flip(1)} if name in ("bart", "t5") else {}
    case = Case(
        model, (x,), nn.CrossEntropyLoss(), torch.randint(V, (6 * N,)), extra, token_logits, name
    )
    G = per_sample_grads(case)
    with rules_restored():
        if name == "gemma2":
            extend(case.model), extend(case.loss_fn)
            with (
                pytest.raises(UnsupportedError, match=r"embed_tokens.*Register a rule"),
                backpack(KFAC()),
            ):
                case.loss().backward()

            @register_rule(Gemma2TextScaledWordEmbedding)
            class ScaledRule(type(RULES[nn.Embedding])):
                def cotangents(self, site, g):
                    return site.module.embed_scale * super().cotangents(site, g)

        case.model.zero_grad()
        run(case)
    for key, p in case.model.named_parameters():
        close_enough = 1e-5 if name == "gemma2" else 1e-10  # its norms compute in float32
        torch.testing.assert_close(p.grad_batch, G[key], rtol=0, atol=close_enough)


def test_too_large_without_a_rule_is_named():
    case = build("vit")
    extend(case.model), extend(case.loss_fn)
    with (
        pytest.raises(UnsupportedError, match=r"block of \S*position_embeddings \(.*\) would be \d+ x"),
        backpack(KFAC(max_dim=35)),
    ):
        case.loss().backward()
    with backpack(KFAC(max_dim=35, oversize="diagonal")):
        case.loss().backward()
    assert isinstance(case.model.vit.embeddings.position_embeddings.kfac, DiagonalBlock)


# -- tied weights, batch norm ----------------------------------------------------------------------


def test_tied_weights_are_sums_without_cross_terms():
    """Relative Frobenius distances to the exact block of the tied parameter.

    For these random weights; "roles" is the sum of both roles' exact blocks, so that what the first
    column has is due to the cross terms, which no sum of roles can have:

    ======= ======= ======= =======
    model   roles   expand  reduce
    ======= ======= ======= =======
    GPT-2   0.27    0.30    0.32
    BERT    0.07    0.09    0.09
    ======= ======= ======= =======
    """
    bounds = {"gpt2": (0.27, 0.30, 0.32), "bert": (0.074, 0.088, 0.094)}
    for name, path in TIED.items():
        exact = reference_blocks(name)[path]
        (forms, H), tied = reference_forms(name), computed(name, "sdpa").model.get_parameter(path)
        roles = 0
        for key, module in computed(name, "sdpa").model.named_modules():
            if isinstance(module, (nn.Embedding, nn.Linear)) and module.weight is tied:
                a, J = forms[key]
                J = torch.einsum("gndso,gnsi->gndoi", J, a)[0]
                J = J.mT if isinstance(module, nn.Embedding) else J
                roles = roles + torch.einsum("ndp,nde,neq->pq", J.flatten(2), H, J.flatten(2))
        for field in FIELDS.values():
            assert (
                isinstance(getattr(tied, field), KroneckerSum) and len(getattr(tied, field).terms) == 2
            )
        found = [roles, *(getattr(tied, field).to_dense() for field in FIELDS.values())]
        distances = [((M - exact).norm() / exact.norm()).item() for M in found]
        assert distances == pytest.approx(bounds[name], rel=0.05)


def test_batch_norm_in_training_mode():
    """It couples the data: per-sample quantities raise, empirical and sampled vectors do not."""
    for ext in (BatchGrad(), BatchL2Grad(), DiagGGN(), KFAC(fisher="exact")):
        case = build("resnet")
        case.model.train()
        extend(case.model), extend(case.loss_fn)
        with pytest.raises(UnsupportedError, match="batch norm in training mode"), backpack(ext):
            case.loss().backward()
    case, plain = build("resnet"), build("resnet")
    case.model.train(), plain.model.train()
    extend(case.model), extend(case.loss_fn)
    samples = KFAC("expand", "mc", mc_samples=5000, savefield="kfac_mc")
    with backpack(samples, KFAC("expand", "empirical")):
        case.loss().backward()
    calls, logits = layer_calls(plain)
    z = [call.z for call in calls]
    grads = torch.autograd.grad(plain.loss_fn(logits, plain.target), z, retain_graph=True)
    q = logits.detach().softmax(1)
    H = (torch.diag_embed(q) - q[:, :, None] * q[:, None, :]) / N
    columns = [torch.autograd.grad(f, z, retain_graph=True) for f in logits.flatten()]
    for k, (call, g) in enumerate(zip(calls, grads, strict=True)):
        p = case.model.get_submodule(call.name).weight
        rows = normal_outputs(call.module, g).flatten(0, 2)
        agree(case, p.kfac.B, N * rows.T @ rows)
        # samples of different data are independent, so that no datum's vectors meet another's
        J = torch.stack([normal_outputs(call.module, c[k]).flatten(0, 2) for c in columns])
        J = J.unflatten(0, (N, CLASSES))
        B = torch.einsum("ncro,ncd,ndrp->op", J, H, J)
        assert (p.kfac_mc.B - B).norm() < 0.1 * B.norm()
