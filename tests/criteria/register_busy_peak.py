"""A criterion of one's own: an expert's largest output, times how often it is used."""

import moecollab as mc
from moecollab.criteria import Criterion, Needs


def busy_peak(evidence):
    return evidence.tallies["max_abs"] * evidence.tallies.count


mc.criteria.register(Criterion("busy_peak", Needs.ROUTING | Needs.OUTPUT_NORMS, busy_peak))
