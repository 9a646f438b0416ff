"""The notebooks run top to bottom without an error or a warning. Their claims hold for the seed at
hand. They are committed as they were executed. The checks of their exercises know a solution from
a stub and from a likely mistake."""
import itertools
import json
import re

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import dpo
import losses
import world
from conftest import ROOT
from exercises import checks, solutions
from exercises.compare import assert_same
from exercises.solutions import kl_from_rewards, objective
from lab import tabular

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])


def read(path):
    return nbformat.read(path, as_version=4)


def cells_of(notebook, cell_type):
    return [cell for cell in notebook.cells if cell.cell_type == cell_type]


def outputs_of(notebook):
    outputs = []
    for cell in cells_of(notebook, "code"):
        outputs += cell.outputs
    return outputs


def printed(notebook, stream):
    """What was printed to "stdout" or to "stderr", a text."""
    return "".join(output.text for output in outputs_of(notebook)
                   if output.output_type == "stream" and output.name == stream)


# ---- The notebooks

@each_notebook
def test_a_notebook_runs_and_its_claims_hold(path, request, monkeypatch):
    """Top to bottom in a fresh kernel, in its own folder, for the seed of --seed. A claim that does
    not hold raises an error in its cell. Nothing may be left on the error stream: a reader would
    see a warning."""
    monkeypatch.setenv("COURSE_SEED", str(request.config.getoption("--seed")))
    notebook = read(path)
    in_its_folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, resources=in_its_folder).execute()
    assert not printed(notebook, "stderr")
    held = [line for line in printed(notebook, "stdout").splitlines() if line.startswith("holds: ")]
    assert len(held) >= 8, "at least eight claims in a notebook"


@each_notebook
def test_a_notebook_is_committed_as_it_was_executed(path):
    """In order, with outputs, without errors or warnings, under 1 MB. It begins with what one
    learns and ends with what is next."""
    notebook = read(path)
    counts = [cell.execution_count for cell in cells_of(notebook, "code")]
    in_order = list(range(1, len(counts) + 1))
    assert counts == in_order, "run it again, top to bottom: see the README"
    assert not [output for output in outputs_of(notebook) if output.output_type == "error"]
    assert not printed(notebook, "stderr")
    assert path.stat().st_size < 1_000_000
    text = "\n".join(cell.source for cell in cells_of(notebook, "markdown"))
    for part in ("What you will be able to do", "What you should know", "How long it takes",
                 "**Predict", "**Next:**"):
        assert part in text, f"{path.name} lacks {part!r}"
    exercises = re.findall(r"^### Exercise \d\.\d", text, re.MULTILINE)
    assert len(exercises) >= 3, "at least three exercises in a notebook"
    assert "/work/" not in json.dumps(notebook), "a path of somebody's machine is in an output"


@each_notebook
def test_links_of_a_notebook_lead_somewhere(path):
    for cell in cells_of(read(path), "markdown"):
        for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
            there = target.startswith("http") or (path.parent / target).exists()
            assert there, f"{path.name} links to {target}"


# ---- Exercises: a solution, and what is often written instead. The key is a piece of what the
# check should say to it.

def forwards(rewards, values, lam):
    """4.2 begun at the wrong end: an advantage that adds up what came before."""
    next_values = torch.cat([values[1:], torch.zeros(1).double()])
    out = (rewards + next_values - values).tolist()
    for t in range(1, len(out)):
        out[t] += lam * out[t - 1]
    return torch.tensor(out, dtype=torch.float64)


def expected_reward(p, r):
    return sum(a * c for a, c in zip(p, r))


def clip_ratio(ratio, clip):
    return ratio.clamp(1 - clip, 1 + clip)


def score_in_place(score, logps, ref_logps, beta):
    """4.1 without the log-ratio of the last token."""
    penalty = beta * (logps - ref_logps)
    return torch.cat([-penalty[:-1], torch.tensor([score]).double()])


def log_of_a_mean(h, p, beta):
    """5.2 with the logarithm outside the mean over the two labels."""
    return -(p * torch.sigmoid(beta * h) + (1 - p) * torch.sigmoid(-beta * h)).log()


def factor(weights, beta, eta, k):
    """5.3 with the k-th smallest eigenvalue."""
    return 1 - eta * beta ** 2 * torch.linalg.eigvalsh(tabular.laplacian(weights))[k]


def take_flips_away(p, eps, beta):
    """5.4 with robust DPO's labels, which must stay between 0 and 1."""
    return torch.logit(((p - eps) / (1 - 2 * eps)).clamp(0.01, 0.99)) / beta


def one_sweep(drawn):
    """5.5 with each response looked at once, in order."""
    tied = [0]
    for y in range(1, len(drawn)):
        if any(drawn[i, y] > 0 for i in tied):
            tied.append(y)
    return [y for y in range(len(drawn)) if y not in tied]


def rejected_change(ref, reward, beta):
    """7.2 for the rejected responses."""
    lost = tabular.preferred_ft(ref, tabular.preferences(reward).T).exp()
    return (lost * (world.optimal_policy(ref, reward, beta) - ref)).sum()


def without_log_z(ref, reward, beta):
    """7.2 with a pi* that does not sum to 1."""
    return (tabular.preferred_ft(ref, tabular.preferences(reward)).exp() * reward / beta).sum()


def mean_over_the_reference(ref, reward, beta):
    """7.2 without the annotator."""
    return (ref.exp() * (world.optimal_policy(ref, reward, beta) - ref)).sum()


EXERCISES = {
    "1_1": (objective, {
        "the KL is missing": lambda p, q, r, beta: expected_reward(p, r),
        "Eq. 3 subtracts":
            lambda p, q, r, beta: 2 * expected_reward(p, r) - objective(p, q, r, beta),
        "beta is missing": lambda p, q, r, beta: objective(p, q, r, 1.0),
        "the expectation is under the policy":
            lambda p, q, r, beta: expected_reward(p, r) + objective(q, p, [0] * 3, beta)}),
    "1_2": (solutions.optimal_policy, {
        "does not sum to 1": lambda ref, r, beta: ref + r / beta,
        "the wrong way round": lambda ref, r, beta: torch.log_softmax(ref + r * beta, -1),
        "These are probabilities": lambda ref, r, beta: torch.softmax(ref + r / beta, -1),
        "The reference is missing": lambda ref, r, beta: torch.log_softmax(r / beta, -1)}),
    "1_3": (solutions.reward_difference, {
        "beta is missing": lambda pi, ref, beta, i, j: (pi - ref)[i] - (pi - ref)[j],
        "The sign is flipped":
            lambda pi, ref, beta, i, j: beta * ((pi - ref)[j] - (pi - ref)[i]),
        "how likely, not how good": lambda pi, ref, beta, i, j: beta * (pi[i] - pi[j])}),
    "1_4": (solutions.beta_for_half_a_nat(), {"a smaller beta": 50.0, "a larger beta": 0.01}),
    "3_1": (solutions.accuracy, {
        "A tie counts as wrong": lambda w, l: (w > l).float().mean(),
        "A tie counts as right": lambda w, l: (w >= l).float().mean(),
        "Divide by the number":
            lambda w, l: (w > l).sum() + 0.5 * (w == l).sum() if w.any() else 0.5,
        "(chosen_rewards > rejected_rewards).float().mean()": lambda w, l: (w > l).mean(),
        "the chosen reward should be the larger": lambda w, l: solutions.accuracy(l, w)}),
    "3_2": (kl_from_rewards, {
        "a KL is never negative": lambda w, l, beta: -kl_from_rewards(w, l, beta),
        "beta is still in it": lambda w, l, beta: kl_from_rewards(w, l, 1.0),
        "contain beta already, so divide by beta":
            lambda w, l, beta: -(w.mean() + l.mean()) / 2 * beta,
        "take the mean of both": lambda w, l, beta: 2 * kl_from_rewards(w, l, beta)}),
    "3_3": (solutions.missing_mass, {
        "upside down": lambda p, q: solutions.missing_mass(q, p),
        "the exp of a mean": lambda p, q: 1 - (p - q).mean().exp(),
        "what is missing": lambda p, q: (p - q).exp().mean()}),
    "4_1": (solutions.token_rewards, {
        "It is a penalty": lambda s, p, q, beta: solutions.token_rewards(s, q, p, beta),
        "beta is missing": lambda s, p, q, beta: solutions.token_rewards(s, p, q, 1.0),
        "at every token": lambda s, p, q, beta: s - beta * (p - q),
        "at the first token":
            lambda s, p, q, beta: solutions.token_rewards(s, p.flip(0), q.flip(0), beta).flip(0),
        "not put in its place": score_in_place}),
    "4_2": (solutions.gae, {
        "the TD errors alone": lambda r, v, lam: solutions.gae(r, v, 0.0),
        "lam is missing": lambda r, v, lam: solutions.gae(r, v, 1.0),
        "The values are missing": lambda r, v, lam: solutions.gae(r, 0 * v, lam),
        "the reward to go": lambda r, v, lam: solutions.gae(r, 0 * v, 1.0),
        "its V' is 0":
            lambda r, v, lam: solutions.gae(r + torch.tensor([0, 0, 1]) * v, v, lam),
        "It runs forwards": forwards}),
    "4_3": (solutions.clipped_gain, {
        "Nothing is clipped": lambda ratio, a, clip: ratio * a,
        "clipped on both sides": lambda ratio, a, clip: clip_ratio(ratio, clip) * a,
        "the pessimistic one":
            lambda ratio, a, clip: torch.maximum(ratio * a, clip_ratio(ratio, clip) * a),
        "That is the loss": lambda ratio, a, clip: -solutions.clipped_gain(ratio, a, clip)}),
    "4_4": (solutions.baseline, {
        "E[r] alone": lambda p, q, r, beta: (p.exp() * r).sum(),
        "It is a penalty": lambda p, q, r, beta: (p.exp() * (r + beta * (p - q))).sum(),
        "beta is missing": lambda p, q, r, beta: solutions.baseline(p, q, r, 1.0),
        "come from the policy": lambda p, q, r, beta: (q.exp() * (r - beta * (p - q))).sum(),
        "beta log Z": lambda p, q, r, beta: beta * torch.logsumexp(q + r / beta, -1)}),
    "5_1": (solutions.rda_loss, {
        "The factor 1/2 is missing": lambda h, gap, beta: (beta * h - gap) ** 2,
        "Nothing is squared": lambda h, gap, beta: beta * h - gap,
        "Square it": lambda h, gap, beta: (beta * h - gap).abs(),
        "beta is missing": lambda h, gap, beta: solutions.rda_loss(h, gap, 1.0),
        "beta stands outside": lambda h, gap, beta: beta * solutions.rda_loss(h, gap, 1.0),
        "The gap is added": lambda h, gap, beta: solutions.rda_loss(h, -gap, beta),
        "the loss of each pair": lambda h, gap, beta: solutions.rda_loss(h, gap, beta).mean()}),
    "5_2": (solutions.pra_loss, {
        "p is not in it": lambda h, p, beta: -torch.sigmoid(beta * h).log(),
        "The second term is missing": lambda h, p, beta: -p * torch.sigmoid(beta * h).log(),
        "are swapped": lambda h, p, beta: solutions.pra_loss(-h, p, beta),
        "beta is missing": lambda h, p, beta: solutions.pra_loss(h, p, 1.0),
        "The loss is minus it": lambda h, p, beta: -solutions.pra_loss(h, p, beta),
        "the wrong sign": lambda h, p, beta: (-p * torch.sigmoid(beta * h).log()
                                              + (1 - p) * torch.sigmoid(-beta * h).log()),
        "The logarithms are missing":
            lambda h, p, beta: -p * torch.sigmoid(beta * h) - (1 - p) * torch.sigmoid(-beta * h),
        "the logarithm of a mean": log_of_a_mean}),
    "5_3": (solutions.contraction, {
        "the fastest direction": lambda w, beta, eta: factor(w, beta, eta, -1),
        "Take the second smallest": lambda w, beta, eta: factor(w, beta, eta, 0),
        "beta is squared": lambda w, beta, eta: solutions.contraction(w, beta ** 0.5, eta),
        "beta is missing": lambda w, beta, eta: solutions.contraction(w, 1.0, eta),
        "eta is missing": lambda w, beta, eta: solutions.contraction(w, beta, 1.0),
        "what it leaves": lambda w, beta, eta: 1 - solutions.contraction(w, beta, eta),
        "Take those of the Laplacian":
            lambda w, beta, eta: 1 - eta * beta ** 2 * torch.linalg.eigvalsh(w)[1]}),
    "5_4": (solutions.cdpo_margin, {
        "where DPO stops": lambda p, eps, beta: solutions.cdpo_margin(p, 0.0, beta),
        "Divide it by beta": lambda p, eps, beta: solutions.cdpo_margin(p, eps, 1.0),
        "multiplied by beta": lambda p, eps, beta: solutions.cdpo_margin(p, eps, 1 / beta),
        "its log-odds": lambda p, eps, beta: (1 - eps) * p + eps * (1 - p),
        "The sign is flipped": lambda p, eps, beta: solutions.cdpo_margin(1 - p, eps, beta),
        "the largest margin":
            lambda p, eps, beta: solutions.cdpo_margin(torch.ones_like(p), eps, beta),
        "as robust DPO does": take_flips_away}),
    "5_5": (solutions.undetermined, {
        "its log-ratio to itself": lambda drawn: [0, *solutions.undetermined(drawn)],
        "These are the responses that are determined":
            lambda drawn: set(range(len(drawn))) - set(solutions.undetermined(drawn)),
        "one comparison only":
            lambda drawn: [y for y in range(1, len(drawn)) if drawn[0, y] == 0],
        "You went through the responses once": one_sweep,
        "A response can be compared and still be free":
            lambda drawn: [y for y in range(len(drawn)) if not drawn[y].any()],
        "Wanted is": lambda drawn: [1]}),
    "6_1": (solutions.soft_value, {
        "That is the mean of Q": lambda q, x, beta: (q.exp() * x).sum(),
        "the largest Q": lambda q, x, beta: x.max(),
        "The reference is missing": lambda q, x, beta: beta * torch.logsumexp(x / beta, -1),
        "in front of the logarithm": lambda q, x, beta: torch.logsumexp(q + x / beta, -1),
        "Q is divided by it, and": lambda q, x, beta: solutions.soft_value(q, x, 1.0),
        "the wrong way round": lambda q, x, beta: solutions.soft_value(q, x, 1 / beta),
        "the policy of the state":
            lambda q, x, beta: torch.log_softmax(q + x / beta, -1)}),
    "6_2": (solutions.rewards_from_tokens, {
        "The padding counts": lambda p, q, mask, beta: beta * (p - q).sum(-1),
        "It is a mean. The rewards": lambda p, q, mask, beta:
            solutions.rewards_from_tokens(p, q, mask, beta) / mask.sum(-1),
        "over the padded length": lambda p, q, mask, beta: (beta * (p - q) * mask).mean(-1),
        "beta is missing":
            lambda p, q, mask, beta: solutions.rewards_from_tokens(p, q, mask, 1.0),
        "The sign is flipped":
            lambda p, q, mask, beta: solutions.rewards_from_tokens(q, p, mask, beta),
        "how likely, not how good":
            lambda p, q, mask, beta: solutions.rewards_from_tokens(p, 0 * q, mask, beta),
        "add up over its tokens": lambda p, q, mask, beta: beta * (p - q) * mask,
        "the sum over all responses": lambda p, q, mask, beta: (beta * (p - q) * mask).sum()}),
    "6_3": (solutions.values_from_tokens, {
        "V(s_0) is missing":
            lambda p, q, beta, v0: solutions.values_from_tokens(p, q, beta, 0.0),
        "Only the last token": lambda p, q, beta, v0: v0 + beta * (p - q),
        "It runs backwards":
            lambda p, q, beta, v0: v0 + (beta * (p - q)).flip(0).cumsum(0).flip(0),
        "beta is missing": lambda p, q, beta, v0: solutions.values_from_tokens(p, q, 1.0, v0),
        "The sign is flipped":
            lambda p, q, beta, v0: solutions.values_from_tokens(q, p, beta, v0),
        "of the whole response alone": lambda p, q, beta, v0: v0 + beta * (p - q).sum(),
        "before the first token": lambda p, q, beta, v0:
            torch.cat([torch.tensor([v0]).double(), v0 + (beta * (p - q)).cumsum(0)])}),
    "6_4": (solutions.culprit, {
        "There the value is lowest": lambda values: values.argmin(),
        "After this token": lambda values: values.argmin() - 1,
        "off by one": lambda values: values.diff().argmin() + 1,
        "the value rises most": lambda values: values.diff().argmax(),
        "how much is lost": lambda values: values.diff().min()}),
    "7_1": (solutions.stray_mass, {
        "the mass on the likely": lambda p, q, least: (p * (q >= least)).sum(-1),
        "The reference has to decide": lambda p, q, least: solutions.stray_mass(p, p, least),
        "the reference's own mass": lambda p, q, least: solutions.stray_mass(q, q, least),
        "how many tokens are unlikely": lambda p, q, least: (q < least).double().sum(-1),
        "a mean over the vocabulary": lambda p, q, least: (p * (q < least)).mean(-1),
        "one number for all beginnings": lambda p, q, least: (p * (q < least)).sum(),
        "exactly `least` is likely": lambda p, q, least: (p * (q <= least)).sum(-1)}),
    "7_2": (solutions.chosen_change, {
        "log Z is missing": without_log_z,
        "beta is missing": lambda q, r, beta: solutions.chosen_change(q, r, 1.0),
        "use preferred_ft": mean_over_the_reference,
        "the mean over pi*":
            lambda q, r, beta: world.kl(world.optimal_policy(q, r, beta), q),
        "the rejected responses": rejected_change,
        "The sign is flipped": lambda q, r, beta: -solutions.chosen_change(q, r, beta),
        "the beta in front": lambda q, r, beta: beta * solutions.chosen_change(q, r, beta),
        "Return one number": lambda q, r, beta: world.optimal_policy(q, r, beta) - q}),
    "7_3": (solutions.distance, {
        "the KL to the other reference":
            lambda q, other, r, beta: solutions.distance(other, other, r, beta),
        "has no effect there. It stands":
            lambda q, other, r, beta: solutions.distance(q, q, r, beta),
        "the other way round": lambda q, other, r, beta: solutions.distance(other, q, r, beta),
        "The expectation is under the target":
            lambda q, other, r, beta: world.kl(q, world.optimal_policy(other, r, beta)),
        "between the two references": lambda q, other, r, beta: world.kl(other, q),
        "beta is missing": lambda q, other, r, beta: solutions.distance(q, other, r, 1.0),
        "the wrong way round":
            lambda q, other, r, beta: solutions.distance(q, other, r, 1 / beta),
        "does not sum to 1": lambda q, other, r, beta: world.kl(other + r / beta, q),
        "beta times the KL":
            lambda q, other, r, beta: beta * solutions.distance(q, other, r, beta)}),
    "7_4": (solutions.best_of_n, {
        "The proxy has to decide": lambda n, proxy, w: solutions.best_of_n(n, w, w),
        "Return its worth":
            lambda n, proxy, w: solutions.best_of_n(n, proxy, proxy if n > 1 else w),
        "The worst of the draws": lambda n, proxy, w: solutions.best_of_n(n, -proxy, w),
        "n has no effect": lambda n, proxy, w: w.mean(),
        "not sorted by the proxy":
            lambda n, proxy, w: solutions.best_of_n(n, torch.arange(len(w)), w),
        "the best sample of all":
            lambda n, proxy, w: w[proxy.argmax()] if n > 1 else w.mean()}),
    "8_1": (solutions.PATIENTS["A"], {
        "the right file": "data.pad", "so is all of its file": "train.train_dpo",
        "write the name of a function": "collate"}),
    "8_2": (solutions.PATIENTS["B"], {
        "the right file": "data.collate", "so is all of its file": "model.GPT.generate"}),
    "8_3": (solutions.PATIENTS["C"], {
        "the right file": "model.GPT.generate", "so is all of its file": "trie.Trie.logps"}),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercises_check_knows_right_from_wrong(name, capsys):
    check, (solution, mistakes) = getattr(checks, f"exercise_{name}"), EXERCISES[name]
    assert check(solution)
    assert "right." in capsys.readouterr().out
    stub = (lambda *args: ...) if callable(solution) else None
    for empty in (..., stub):
        assert not check(empty)
        assert "not started" in capsys.readouterr().out
    for message, wrong in mistakes.items():
        assert not check(wrong)
        said = capsys.readouterr().out
        assert "not yet" in said and message in said, said
    # an error in the answer itself is reported
    assert not check(lambda *args: 1 / 0 if args else 0)
    assert "not yet" in capsys.readouterr().out


def test_the_last_patients(capsys):
    """Exercise 8.4 asks for three functions at once. Those of solutions.PATIENTS are right."""
    assert not checks.exercise_8_4(..., ..., ...)
    assert "not started" in capsys.readouterr().out
    d, e, f = [solutions.PATIENTS[patient] for patient in "DEF"]
    assert not checks.exercise_8_4(d, e, "world.win_rate")
    assert "Patient F: this is the right file" in capsys.readouterr().out
    assert checks.exercise_8_4(d, e, f)


def test_every_exercise_of_the_notebooks_is_here():
    asked = set()
    for path in NOTEBOOKS:
        for cell in cells_of(read(path), "code"):
            asked.update(re.findall(r"checks\.exercise_(\d_\d)", cell.source))
    assert asked == set(EXERCISES) | {"8_4"}


def test_the_solution_of_exercise_4_by_another_way():
    """The bisection's beta against world.beta_at_kl's, to 1e-6."""
    ref, reward = checks.small_world(2)
    want = world.beta_at_kl(ref[None], reward[None], 0.5)
    assert solutions.beta_for_half_a_nat() == pytest.approx(want, rel=1e-6)


def test_the_solutions_of_notebook_5_by_another_way():
    """RDA's slope in h is beta times the error. PRA is the mean of the DPO loss over both labels.
    At cDPO's margin the slope of cDPO's mean loss is 0. What a step of gradient descent leaves of
    the slowest direction is the contraction, to 1e-6."""
    p = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    gap, zero, beta = torch.logit(p), torch.zeros(3, dtype=torch.float64), 0.7
    h = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(solutions.rda_loss(h, gap, beta).sum(), h)[0]
    assert_same(slope, beta * (beta * h - gap), 1e-12, what="RDA's slope")

    def mean_loss(loss, h, **options):
        first, second = [loss(x, zero, zero, zero, beta=beta, **options)[0] for x in (h, -h)]
        return p * first + (1 - p) * second

    assert_same(solutions.pra_loss(h, p, beta), mean_loss(dpo.dpo_loss, h), 1e-12, what="PRA")
    stop = solutions.cdpo_margin(p, 0.2, beta).requires_grad_()
    cdpo = mean_loss(losses.cdpo_loss, stop, label_smoothing=0.2)
    assert_same(torch.autograd.grad(cdpo.sum(), stop)[0], zero, 1e-12, what="cDPO's slope")

    ref, reward = checks.small_world(6)
    star, eta = world.optimal_policy(ref, reward, beta), 0.5
    weights = torch.rand(5, 5, dtype=torch.float64).triu(1)
    weights = weights + weights.T

    def loss(theta):
        logps = torch.log_softmax(theta, -1)
        preference = tabular.preferences(reward)
        return tabular.population_loss(logps, ref, preference, beta, weights / 2)

    slope = torch.sigmoid(reward[:, None] - reward[None, :])
    weights_at_star = weights * slope * (1 - slope)
    slowest = torch.linalg.eigh(torch.autograd.functional.hessian(loss, star))[1][:, 1]
    leaf = (star + 1e-7 * slowest).requires_grad_()
    after = leaf.detach() - eta * torch.autograd.grad(loss(leaf), leaf)[0]
    left = ((after - star) @ slowest) / 1e-7
    assert_same(left, solutions.contraction(weights_at_star, beta, eta), 1e-6,
                what="what a step leaves")


def test_the_solutions_of_notebook_7_by_another_way():
    """The stray mass is losses.stray_mass of logits. The change of the chosen responses and the
    best of n are means over every pair and every draw, listed one by one."""
    p, q = torch.rand(3, 6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    assert_same(solutions.stray_mass(p, q, 0.15), losses.stray_mass(p.log(), q >= 0.15), 1e-12,
                what="the stray mass")

    ref, reward = checks.small_world(6)
    change, total = world.optimal_policy(ref, reward, 0.7) - ref, 0.0
    for i, j in itertools.product(range(5), repeat=2):  # i and j are drawn, and one is chosen
        i_wins = torch.sigmoid(reward[i] - reward[j])
        total += (ref[i] + ref[j]).exp() * (i_wins * change[i] + (1 - i_wins) * change[j])
    assert_same(solutions.chosen_change(ref, reward, 0.7), total, 1e-12, what="the change")

    proxy, worth = torch.randn(2, 5, dtype=torch.float64)
    kept = [worth[max(draws, key=lambda k: proxy[k])]
            for draws in itertools.product(range(5), repeat=3)]
    assert_same(solutions.best_of_n(3, proxy, worth), sum(kept) / len(kept), 1e-12,
                what="the best of 3")

    other, _ = checks.small_world(8)
    weights = other.exp() * (reward / 0.7).exp()
    weights = weights / weights.sum()
    want = (weights * (weights / ref.exp()).log()).sum()
    assert_same(solutions.distance(ref, other, reward, 0.7), want, 1e-12, what="the KL")
