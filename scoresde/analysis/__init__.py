"""Exact answers about plans: moments, orders of convergence, stability, error against work."""

from scoresde.analysis.moments import (
    ExactMoments,
    Response,
    Stability,
    amplification,
    exact_moments,
    flow_error,
    gaussian_stds,
    point_mass_defect,
    response,
    stability,
    weak_error,
)
from scoresde.analysis.orders import Order, convergence_order, exact_flow, order_residuals, weak_order
from scoresde.analysis.work import Work, work_precision

__all__ = [
    "ExactMoments",
    "Order",
    "Response",
    "Stability",
    "Work",
    "amplification",
    "convergence_order",
    "exact_flow",
    "exact_moments",
    "flow_error",
    "gaussian_stds",
    "order_residuals",
    "point_mass_defect",
    "response",
    "stability",
    "weak_error",
    "weak_order",
    "work_precision",
]
