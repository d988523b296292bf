"""Colours of curves, in pictures and in MLflow."""

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers can tell apart."""

DISTINCT = (*OKABE_ITO, "#332288", "#882255", "#999933", "#000000")
"""Colours of more curves: some of Paul Tol's muted ones, https://sronpersonalpages.nl/~pault, and
black."""
