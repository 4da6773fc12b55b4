"""One posterior per prompt: a state-space model of its log-odds of success, and the choice of prompts under it.

The log-odds of prompt i at step t are

    x_i(t) = m(t) + z_i(t),    z_i reverts to g_i = w . [phi_i, 1]

`m`, the common drift of an improving policy, is a random walk from 0. `g_i` is the prediction from the prompt's
embedding `phi_i`: Bayesian linear regression, which is a Gaussian process of low rank (Rasmussen & Williams 2006,
section 2.1). `z_i`, the prompt's own course, is an Ornstein-Uhlenbeck process around `g_i`, filtered in closed form
(Kalman 1960); all three are in `model.py`. A group of n completions is a binomial count of `sigmoid(x_i + noise)`
(`observation.py`). Time is counted in updates of mean size. The constants are fitted to the run by empirical Bayes
(`evidence.py`). `table.py` and `acquisition.py` turn a belief into forecasts and into a choice, `calibration.py`
corrects P(informative) by the run's own outcomes, and `prior.py` adds another model's success rates to the features.
"""
