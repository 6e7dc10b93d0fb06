"""Forecasting models on one interface, and the parts that they are made of."""

from ._heads import Head as Head, Point as Point, Quantile as Quantile, StudentT as StudentT
from ._inputs import ForecastModel as ForecastModel, Series as Series
from ._losses import (
    mae as mae,
    mse as mse,
    negative_log_likelihood as negative_log_likelihood,
    quantile_loss as quantile_loss,
)
from ._parts import Affine as Affine, instance_norm as instance_norm
from ._student_t import StudentTForecast as StudentTForecast
