"""The table that `python dpo.py` prints."""


def print_check(rows, weights, beta):
    """Print the rows of dpo.gradient_check with a verdict each, as they are ready.

    weights (B,): the weights of the pairs, dpo.gradient_weight. Raises SystemExit, naming the
    rows, where a gradient is wrong.
    """
    shown = ", ".join(f"{w:.3f}" for w in weights)
    print(f"The gradient of the DPO loss (Eq. 7) on {len(weights)} pairs, a 2-layer GPT, float64, "
          f"beta = {beta}.")
    print("analytic:    -beta E[sigma(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l))]")
    print(f"             with the weights sigma(r_l - r_w) = {shown}")
    print("autograd:    PyTorch's gradient of the loss itself")
    print("differences: [L(x + 1e-5) - L(x - 1e-5)] / 2e-5, for every entry")
    print(f"\n{'gradient with respect to':<26}{'shape':<13}{'largest':>9}{'vs autograd':>13}"
          f"{'vs differences':>16}")
    wrong = []
    for name, shape, autograd, differences, largest in rows:
        verdict = "approximate"
        if autograd <= 1e-14 * max(1.0, largest):
            verdict = "exact"
        if not (autograd <= 1e-9 and differences <= 1e-6):  # nan is wrong too
            verdict = "WRONG"
            wrong.append(name)
        print(f"{name:<26}{str(shape):<13}{largest:>9.1e}{autograd:>13.1e}{differences:>16.1e}"
              f"  {verdict}", flush=True)
    print("\nColumns: the largest entry of the gradient, and the largest difference of any entry.")
    print("exact: within float64's rounding of autograd (1e-14). approximate: within 1e-9.")
    print("Both are within 1e-6 of the differences, whose own error is 1e-10 and rounding.")
    if wrong:
        raise SystemExit(f"the gradient is wrong for {', '.join(wrong)}: "
                         "see which level is the first to differ")
