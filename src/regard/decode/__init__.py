"""Search, blind to the model: tokens and a state go in, log-probabilities and the next state come out.

    search.py        the loop that all strategies share; greedy, beam search and forced scores as functions
    strategies.py    which children of the open hypotheses are looked at: greedy, sampling, beam, diverse beam, forced
    rules.py         what may come next: lengths, prefixes, bans, no repetition
    constraints.py   phrases that an output must hold
    hypotheses.py    hypotheses, open and ended, and their scores
    ensemble.py      several models that answer as one
"""
