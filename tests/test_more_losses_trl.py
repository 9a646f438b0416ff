"""The league's losses beside TRL's own lines: values and gradients, to 1e-6, float64.

This file needs TRL 1.16.0 and is skipped without it; TRL is not among the requirements. TRL's
trainers are not built. Their methods run on a stand-in that holds only settings. A stand-in for a
model gives the log-probabilities of tokens, or logits. So what is executed is TRL from there to the
scalar loss, masks and averages included.

Where TRL 1.16.0 differs from the papers, or from the trainers of their authors:
- ipo and sigmoid_norm divide by the length. The IPO paper sums.
- sft, the likelihood term of RPO, averages over all tokens of the batch. RPO averages over the
  tokens of each response. The two agree on responses of equal length, or on a single pair.
- CPO's likelihood term does the same. ORPO's averages over the prompt's tokens too.
- sppo_hard is twice the loss of its authors' trainer.
- bco_pair has lost its delta. It was a running mean of the rewards up to TRL 0.23.
- hinge is the loss of RSO. The hinge of SLiC-HF, without a reference, is in the CPOTrainer.
- sigmoid ignores label_smoothing without a word. exo_pair refuses its default, 0, because its loss
  would be infinite.
- Three places compute in float32: ORPO's odds, and EXO's two logarithms of label_smoothing.
"""
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import dpo
import losses
from lab.more_losses import LEAGUE, kto_kl
from tools import assert_same, vector

pytest.importorskip("trl", minversion="1.16.0")
from trl.experimental.cpo.cpo_trainer import CPOTrainer  # noqa: E402
from trl.experimental.orpo.orpo_trainer import ORPOTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402

BETAS = [0.1, 1.0]
PROMPT = 3  # tokens


def settings(**chosen):
    """What TRL's methods read from a trainer."""
    def unchanged(x):
        return x
    defaults = dict(
        accelerator=SimpleNamespace(device="cpu", gather=unchanged, gather_for_metrics=unchanged),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, use_weighting=False,
        f_divergence_type="reverse_kl", label_smoothing=0.0, loss_weights=[1.0],
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(discopop_tau=0.05), is_encoder_decoder=False,
        model=SimpleNamespace(training=True))
    return SimpleNamespace(**defaults | chosen)


class FromTokens:
    """In the place of a model: sums over tokens are given, and spread evenly over each response."""
    def __init__(self, sums, lengths):
        self.sums, self.lengths = sums, lengths

    def __call__(self, input_ids, **_):
        """Outputs as of transformers with fused_lm_head: log_probs (N, T-1), 0 off the response."""
        inside = completion_mask(self.lengths, input_ids.size(1))[:, 1:].bool()
        zero = torch.zeros(inside.shape, dtype=torch.float64)
        log_probs = torch.where(inside, (self.sums / self.lengths)[:, None], zero)
        return SimpleNamespace(log_probs=log_probs, entropy=zero, mean_logits=zero,
                               is_top1=inside)


def completion_mask(lengths, width):
    position = torch.arange(width)
    return ((position >= PROMPT) & (position < PROMPT + lengths[:, None])).long()


def example(equal_lengths=False):
    """(four log-probabilities (6,), the chosen and the rejected lengths (6,)), at random."""
    logps = list(-8 * torch.rand(4, 6, dtype=torch.float64) - 0.5)
    lengths = torch.randint(1, 9, (2, 6)).double()
    return logps, (torch.full_like(lengths, 5) if equal_lengths else lengths)


def trl_dpo(names, logps, lengths, beta, **chosen):
    """DPOTrainer._compute_loss: the mean loss, a scalar."""
    sums, lengths = torch.cat(logps[:2]), torch.cat(list(lengths))
    width = PROMPT + 8
    ids = torch.zeros(len(sums), width, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "completion_mask": completion_mask(lengths, width),
              "ref_chosen_logps": logps[2], "ref_rejected_logps": logps[3]}
    trainer = settings(beta=beta, loss_types=names, **chosen)
    return DPOTrainer._compute_loss(trainer, FromTokens(sums, lengths), inputs, False)


def assert_same_losses(name, ours, theirs, logps):
    """The mean of ours (B,) and theirs, a scalar, and the gradients of both, to 1e-6."""
    assert theirs != 0, f"{name}: TRL's loss is 0, which proves nothing"
    assert_same(ours.mean(), theirs, 1e-6, what=f"the mean {name} loss beside TRL")
    leaves = logps[:2]
    mine = torch.autograd.grad(ours.mean(), leaves, retain_graph=True)
    other = torch.autograd.grad(theirs, leaves, retain_graph=True)
    for side, a, b in zip(("chosen", "rejected"), mine, other):
        assert b.any(), f"{name}: TRL's gradient is zero"
        assert_same(len(a) * a, len(a) * b, 1e-6,
                    what=f"the gradient of {name} at the {side} responses, beside TRL's")


# the league's name -> (TRL's loss_type, TRL's settings, our further arguments)
IN_DPO_TRAINER = {
    "exo_pair": ("exo_pair", {"label_smoothing": 0.01}, {"label_smoothing": 0.01}),
    "nca_pair": ("nca_pair", {}, {}),
    "bco_pair": ("bco_pair", {}, {"delta": 0.0}),
    "sppo_hard": ("sppo_hard", {}, {}),
    "aot": ("aot", {}, {}),
    "apo_zero": ("apo_zero", {}, {}),
    "apo_down": ("apo_down", {}, {}),
    "discopop": ("discopop", {}, {"tau": 0.05}),
    "sigmoid_norm": ("sigmoid_norm", {}, {}),
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", IN_DPO_TRAINER)
def test_the_losses_of_trls_dpo_trainer(name, beta):
    """Six pairs of several lengths together, and each pair alone. In the batch the gradient tells
    the pairs apart."""
    loss_type, theirs, further = IN_DPO_TRAINER[name]
    logps, lengths = example()
    pairs = [slice(0, 6)] + [slice(i, i + 1) for i in range(6)]
    for some in pairs:
        four = [x[some].clone().requires_grad_() for x in logps]
        of_chosen, of_rejected = lengths[:, some]
        ours = LEAGUE[name][0](*four, beta=beta, **further | (
            {"chosen_lengths": of_chosen, "rejected_lengths": of_rejected}
            if name == "sigmoid_norm" else {}))
        trl = trl_dpo([loss_type], four, (of_chosen, of_rejected), beta, **theirs)
        assert_same_losses(name, ours, trl, four)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo"])
def test_the_losses_of_losses_py(name, beta):
    """DPO, robust DPO, RSO's hinge and IPO as well. IPO on responses of one token, since TRL
    divides by the length."""
    logps, lengths = example()
    lengths = torch.ones_like(lengths) if name == "ipo" else lengths
    four = [x.requires_grad_() for x in logps]
    eps = {"label_smoothing": 0.2} if name == "robust" else {}
    ours = losses.LOSSES[name](*four, beta=beta, **eps)[0]
    assert_same_losses(name, ours, trl_dpo([name], four, lengths, beta, **eps), four)


@pytest.mark.parametrize("beta", BETAS)
def test_rpo_is_trls_sigmoid_plus_sft(beta):
    """With weights 1 and alpha = 0.7. On responses of equal length, and on each pair alone, both
    averages are one. With other lengths they differ, as the docstring above says."""
    def both(logps, lengths):
        ours = LEAGUE["rpo"][0](*logps, beta=beta, chosen_lengths=lengths[0], alpha=0.7)
        return ours, trl_dpo(["sigmoid", "sft"], logps, lengths, beta, loss_weights=[1.0, 0.7])

    logps, lengths = example(equal_lengths=True)
    four = [x.clone().requires_grad_() for x in logps]
    assert_same_losses("rpo", *both(four, lengths), four)
    logps, lengths = example()
    for i in range(6):
        four = [x[i:i + 1].clone().requires_grad_() for x in logps]
        assert_same_losses("rpo", *both(four, lengths[:, i:i + 1]), four)
    ours, theirs = both(logps, lengths)
    assert (ours.mean() - theirs).abs() > 1e-3, "TRL's average over the batch has changed"


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ["cpo", "slic_hf", "simpo"])
def test_the_pair_terms_of_trls_cpo_trainer(name, beta):
    """CPOTrainer.cpo_loss, pair by pair: CPO, the hinge without a reference, and SimPO. It gets
    sums for the first two and means for SimPO, as CPOTrainer.concatenated_forward gives them."""
    logps, (of_chosen, of_rejected) = example()
    four = [x.requires_grad_() for x in logps]
    further = {"cpo": {"chosen_lengths": of_chosen, "alpha": 0}, "slic_hf": {"lam": 0, "delta": 1},
               "simpo": {"chosen_lengths": of_chosen, "rejected_lengths": of_rejected,
                         "gamma": 0.4}}[name]
    ours = LEAGUE[name][0](*four, beta=beta, **further)
    given = four[:2]
    if name == "simpo":
        given = [four[0] / of_chosen, four[1] / of_rejected]
    trainer = settings(beta=beta, alpha=0.0, simpo_gamma=0.4, loss_type={
        "cpo": "sigmoid", "slic_hf": "hinge", "simpo": "simpo"}[name])
    theirs = CPOTrainer.cpo_loss(trainer, *given)[0]
    assert_same(ours, theirs, 1e-6, what=f"the {name} losses beside TRL's")
    assert_same_losses(name, ours, theirs.mean(), four)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ["cpo", "orpo"])
def test_cpo_and_orpo_from_the_logits_of_one_pair(name, beta):
    """get_batch_loss_metrics of TRL, likelihood terms included, down to the gradient at the logits.
    There is one pair, so that both averages over tokens are one. The prompt has one token, so that
    ORPO's likelihood term has no prompt in it: nothing predicts the first token."""
    vocab, of_chosen, of_rejected = 7, 5, 3
    tokens = torch.randint(1, vocab, (2, 1 + of_chosen))
    tokens[1, 0] = tokens[0, 0]
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 1 + of_rejected:] = False  # padding
    logits = torch.randn(2, 6, vocab, dtype=torch.float64, requires_grad=True)
    response = mask.clone()
    response[:, 0] = False
    labels = torch.where(response, tokens, -100)
    batch = {}
    for i, side in enumerate(("chosen", "rejected")):
        batch |= {f"{side}_input_ids": tokens[i:i + 1], f"{side}_labels": labels[i:i + 1],
                  f"{side}_attention_mask": mask[i:i + 1].long()}
    kind = {"cpo": CPOTrainer, "orpo": ORPOTrainer}[name]
    trainer = settings(beta=beta, alpha=0.0, cpo_alpha=0.8, loss_type="sigmoid", pad_token_id=0,
                       padding_value=0, concatenated_inputs=kind.concatenated_inputs,
                       get_batch_logps=kind.get_batch_logps)
    for method in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(kind, method):
            setattr(trainer, method, partial(getattr(kind, method), trainer))

    def model(*_, **__):
        return SimpleNamespace(logits=logits)

    theirs, _ = kind.get_batch_loss_metrics(trainer, model, batch)
    chosen, rejected = dpo.response_logps(logits, tokens, response).chunk(2)
    further = {"chosen_lengths": vector(of_chosen)}
    further |= {"alpha": 0.8} if name == "cpo" else {"rejected_lengths": vector(of_rejected)}
    ours = LEAGUE[name][0](chosen, rejected, chosen * 0, rejected * 0, beta=beta, **further).mean()
    assert_same(ours, theirs.double(), 1e-6, what=f"the {name} loss beside TRL's")
    slopes = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
    assert slopes[1].abs().max() > 1e-3, "TRL's gradient is zero"
    assert_same(*slopes, 1e-6, what=f"the gradient of {name} at the logits, beside TRL's")


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_kto(beta, shift):
    """KTOTrainer._compute_loss, from a batch with two labels. TRL averages over responses, so the
    sum of a pair is twice its mean. Its KL comes from a second call of the model, as kto_kl. With
    a shift of 5 in the reference the KL is cut off at 0."""
    logps, lengths = example()
    four = [x.requires_grad_() for x in logps]
    width, sums, all_lengths = PROMPT + 8, torch.cat(four[:2]), torch.cat(list(lengths))
    ids = torch.zeros(12, width, dtype=torch.long)
    mask = completion_mask(all_lengths, width)
    mismatched = -8 * torch.rand(12, dtype=torch.float64)
    ref_mismatched = mismatched - torch.rand(12, dtype=torch.float64) + shift

    def model(input_ids, **kwargs):
        """The main call, or that on mismatched pairs, whose ids are ones."""
        source = mismatched if input_ids.any() else sums
        return FromTokens(source, all_lengths)(input_ids, **kwargs)

    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask,
             "KL_input_ids": torch.ones_like(ids), "KL_attention_mask": torch.ones_like(ids),
             "KL_completion_mask": mask, "label": torch.arange(12) < 6,
             "ref_logps": torch.cat(four[2:]), "ref_KL_logps": ref_mismatched}
    trainer = settings(beta=beta, calculate_KL=True, loss_type="kto", desirable_weight=1.3,
                       undesirable_weight=0.7)
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    theirs = KTOTrainer._compute_loss(trainer, model, batch, False)
    kl = kto_kl(mismatched, ref_mismatched)
    assert (kl == 0) == (shift > 0)
    ours = LEAGUE["kto"][0](*four, beta=beta, kl=kl, desirable_weight=1.3, undesirable_weight=0.7)
    assert_same_losses("kto", ours, 2 * theirs, four)


def test_trl_ignores_label_smoothing_in_sigmoid_and_needs_it_in_exo():
    """Two differences of the docstring above, as they are in 1.16.0. If this fails, TRL has
    changed, and the docstring must change too."""
    logps, lengths = example()
    plain = trl_dpo(["sigmoid"], logps, lengths, 0.1)
    smoothed = trl_dpo(["sigmoid"], logps, lengths, 0.1, label_smoothing=0.3)
    assert torch.equal(plain, smoothed)
    assert not trl_dpo(["exo_pair"], logps, lengths, 0.1).isfinite()
