"""Test sets: how good a run is, which of several is better, and pages that show it.

    testset.py        sources and their references, from files or a config
    evaluation.py     one translator: every metric, as a whole and by source length
    comparison.py     several systems on one test set: what may be compared, and what differs by more than chance
    significance.py   paired bootstrap and approximate randomisation, by sacreBLEU
    sentences.py      single lines: best, worst, most different, and what is wrong in them
    charts.py         lines over steps and lengths, as geometry that a page draws
    report.py         the pages of a run and of a comparison, from the templates in pages/
"""

from regard.evaluate.evaluation import LONGEST, Bucket, Evaluation, evaluate
from regard.evaluate.testset import TestSet

__all__ = ["LONGEST", "Bucket", "Evaluation", "TestSet", "evaluate"]
