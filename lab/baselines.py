"""The paper's other baselines, section 6: what pairs can be used for without a reference."""
from torch.nn.utils import clip_grad_norm_

import data
import train
from model import sequence_logps


def preferred_ft(policy, examples, run, seed, epochs=1, lr=1e-3):
    """Preferred-FT: supervised learning on the chosen responses. There is no beta in it.

    It ends at tabular.preferred_ft, given enough data.
    """
    def loss(chosen, rejected):
        return -chosen
    return fit_pairs("preferred", policy, examples, loss, run, seed, epochs, lr)


def unlikelihood(policy, examples, run, seed, alpha=0.1, epochs=1, lr=1e-3):
    """Unlikelihood: raise log pi(y_w|x), and lower log pi(y_l|x) with the factor alpha.

    The loss has no minimum if some response loses more than 1/alpha times as often as it wins.
    Then the policy falls apart, and only the number of steps decides how far.
    """
    def loss(chosen, rejected):
        return -chosen + alpha * rejected
    return fit_pairs("unlikelihood", policy, examples, loss, run, seed, epochs, lr)


def fit_pairs(name, policy, examples, loss_of_logps, run, seed, epochs, lr, batch_size=64):
    """Minimise a loss of log pi(y_w|x) and log pi(y_l|x), each (B,), over the pairs.

    policy is changed in place and returned. run: the support.run.Run that this is recorded in.
    """
    device = next(policy.parameters()).device
    optimizer = train.adamw(policy, lr)
    plan = data.epochs([len(e) for e in examples], batch_size, seed, epochs)
    policy.eval()
    for _, [(_, indices)] in run.steps(name, policy, optimizer, plan):
        batch = data.collate([examples[i] for i in indices], device=device)
        logps = sequence_logps(policy, batch["tokens"], batch["response_mask"])  # (2B,)
        chosen, rejected = logps.chunk(2)  # (B,), (B,)
        loss = loss_of_logps(chosen, rejected).mean()
        loss.backward()
        run.log(loss=loss, **{"logps/chosen": chosen.mean(), "logps/rejected": rejected.mean()})
        run.log(grad_norm=clip_grad_norm_(policy.parameters(), train.CLIP))
        optimizer.step()
        optimizer.zero_grad()
    return policy
