"""What turns token ids into hypotheses, behind one interface.

    engine.py        the interface, and torch: every model, every search
    ct2.py           CTranslate2: Transformers, greedy and beam search, several times as fast on a CPU
    ct2_model.py     our weights as a CTranslate2 model, and what that format cannot carry
    check.py         two engines on the same sentences: how far apart they are, and how far they may be
    converted.py     a converted model's folder: written whole and checked, or not at all; the cache of a run
"""
