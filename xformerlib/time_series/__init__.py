"""Forecasting models on one interface, and the parts that they are made of."""

from ._autoregressive import (
    CausalTransformer as CausalTransformer,
    EncoderDecoderTransformer as EncoderDecoderTransformer,
)
from ._classification import SeriesClassifier as SeriesClassifier
from ._conformal import Conformal as Conformal
from ._convolution import TCN as TCN, CausalConvolution as CausalConvolution, WaveNet as WaveNet
from ._crossformer import Crossformer as Crossformer
from ._exogenous import TimeXer as TimeXer
from ._forecaster import Forecaster as Forecaster
from ._group import GroupTransformer as GroupTransformer
from ._heads import Head as Head, Point as Point, Quantile as Quantile, StudentT as StudentT
from ._imputation import Imputer as Imputer
from ._informer import Informer as Informer
from ._inputs import ForecastModel as ForecastModel, Inputs as Inputs, Series as Series
from ._inverted import ITransformer as ITransformer
from ._linear import DLinear as DLinear, SeasonalNaive as SeasonalNaive
from ._losses import (
    mae as mae,
    mse as mse,
    negative_log_likelihood as negative_log_likelihood,
    quantile_loss as quantile_loss,
)
from ._parts import (
    Affine as Affine,
    Time2Vec as Time2Vec,
    calendar_features as calendar_features,
    fill_forward as fill_forward,
    instance_norm as instance_norm,
    patches as patches,
)
from ._patch import PatchTST as PatchTST, TokenBatchNorm as TokenBatchNorm
from ._pooling import AttentionPooling as AttentionPooling
from ._pretraining import MaskedPatches as MaskedPatches
from ._prob_sparse import prob_sparse_attention as prob_sparse_attention
from ._recurrent import (
    RNN as RNN,
    AttentionPoolingRNN as AttentionPoolingRNN,
    AutoregressiveRNN as AutoregressiveRNN,
)
from ._steps import StepwiseModel as StepwiseModel
from ._student_t import StudentTForecast as StudentTForecast
from ._training import Evaluation as Evaluation, Scores as Scores, evaluate as evaluate, train as train
from ._windows import Batch as Batch, Windows as Windows
