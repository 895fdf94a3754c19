"""Whether two samples follow one law."""

import numpy as np
from scipy.stats import chi2


def agree(counts, others, p_value=1e-4):
    """A two-sample chi-square test of two histograms, bins under 20 put together."""
    counts, others = (np.ravel(x).astype(float) for x in (counts, others))
    rare = counts + others < 20
    counts, others = (np.append(x[~rare], x[rare].sum()) for x in (counts, others))
    kept = counts + others > 0
    counts, others = counts[kept], others[kept]
    scale = np.sqrt(others.sum() / counts.sum())
    distance = np.sum((scale * counts - others / scale) ** 2 / (counts + others))
    return chi2.sf(distance, len(counts) - 1) > p_value


def box_law(boxes, edge):
    """Marginal histograms of (top, left, height, width) up to `edge` pixels."""
    return np.stack([np.bincount(column, minlength=edge + 1) for column in boxes.T])
