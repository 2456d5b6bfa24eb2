"""flux_ir: an instrument for looking inside FLUX.1.

Everything public is imported from here, and only when it is first used: `import flux_ir` itself takes no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_ir.activations.source import open_source
    from flux_ir.api.ablate import Atlas, ablate
    from flux_ir.api.attribute import Attributed, attribute
    from flux_ir.api.capture import capture
    from flux_ir.api.collect import collect
    from flux_ir.api.collect_clip import collect_clip
    from flux_ir.api.compare_features import compare_features
    from flux_ir.api.compare_models import compare_models
    from flux_ir.api.compare_quantized import QuantizedComparison, compare_quantized
    from flux_ir.api.comparison_files import Comparison
    from flux_ir.api.convert_collection import convert_collection
    from flux_ir.api.demonstrate import Demonstrated, demonstrate
    from flux_ir.api.draw_features import DrawnFeatures, draw_features
    from flux_ir.api.evaluate_sae import EvaluatedSAE, evaluate_sae
    from flux_ir.api.explore_features import explore_features
    from flux_ir.api.export import export
    from flux_ir.api.export_features import export_features
    from flux_ir.api.export_sae import ExportedSAE, export_sae, load_sae
    from flux_ir.api.features import Features, analyse_features, read_features
    from flux_ir.api.find_examples import find_examples
    from flux_ir.api.label_features import label_features
    from flux_ir.api.lens import CaptureResult, LensResult, read_capture, read_lens
    from flux_ir.api.maps import AttentionMaps, attention_maps
    from flux_ir.api.model_comparison import ComparedModels
    from flux_ir.api.models import decode, encode, encode_prompt, load_model, sample
    from flux_ir.api.plan import MachinePlan, PlannedSetting, plan
    from flux_ir.api.probe import Probed, probe
    from flux_ir.api.progress import Begun, Note, Progress
    from flux_ir.api.score_concepts import ScoredConcepts, score_concepts
    from flux_ir.api.score_features import score_features
    from flux_ir.api.score_steering import ScoredSteering, score_steering
    from flux_ir.api.select_features import select_features
    from flux_ir.api.steer import Steered, steer
    from flux_ir.api.study import Studied, run_study
    from flux_ir.api.text_lens import TextLensResult, text_lens
    from flux_ir.api.train_lens import TrainedLens, train_lens
    from flux_ir.api.train_sae import Trained, TrainingRow, train_sae
    from flux_ir.api.transfer import Transferred, transfer
    from flux_ir.api.visualize import Visualization, create_visualization, explore
    from flux_ir.api.weights import DescribedWeights, describe_weights
    from flux_ir.errors import FluxIRError
    from flux_ir.playing.server import PlayPage, play
    from flux_ir.recording.intervention import Intervention
    from flux_ir.recording.recorder import MemorySink, Recorder, TextRecorder
    from flux_ir.sae.evaluation.splice import spliced
    from flux_ir.sites import Site
    from flux_ir.steering.edits import Edit, read_edits, save_edits
    from flux_ir.steering.regions import Region

__version__ = "0.1.0"

_MODULES = {
    "ablate": "flux_ir.api.ablate",
    "Atlas": "flux_ir.api.ablate",
    "analyse_features": "flux_ir.api.features",
    "attention_maps": "flux_ir.api.maps",
    "AttentionMaps": "flux_ir.api.maps",
    "attribute": "flux_ir.api.attribute",
    "Attributed": "flux_ir.api.attribute",
    "Begun": "flux_ir.api.progress",
    "capture": "flux_ir.api.capture",
    "CaptureResult": "flux_ir.api.lens",
    "collect": "flux_ir.api.collect",
    "collect_clip": "flux_ir.api.collect_clip",
    "compare_features": "flux_ir.api.compare_features",
    "compare_models": "flux_ir.api.compare_models",
    "ComparedModels": "flux_ir.api.model_comparison",
    "compare_quantized": "flux_ir.api.compare_quantized",
    "QuantizedComparison": "flux_ir.api.compare_quantized",
    "Comparison": "flux_ir.api.comparison_files",
    "convert_collection": "flux_ir.api.convert_collection",
    "create_visualization": "flux_ir.api.visualize",
    "decode": "flux_ir.api.models",
    "demonstrate": "flux_ir.api.demonstrate",
    "Demonstrated": "flux_ir.api.demonstrate",
    "encode": "flux_ir.api.models",
    "encode_prompt": "flux_ir.api.models",
    "describe_weights": "flux_ir.api.weights",
    "DescribedWeights": "flux_ir.api.weights",
    "draw_features": "flux_ir.api.draw_features",
    "DrawnFeatures": "flux_ir.api.draw_features",
    "evaluate_sae": "flux_ir.api.evaluate_sae",
    "EvaluatedSAE": "flux_ir.api.evaluate_sae",
    "explore": "flux_ir.api.visualize",
    "explore_features": "flux_ir.api.explore_features",
    "export": "flux_ir.api.export",
    "export_features": "flux_ir.api.export_features",
    "export_sae": "flux_ir.api.export_sae",
    "ExportedSAE": "flux_ir.api.export_sae",
    "Features": "flux_ir.api.features",
    "find_examples": "flux_ir.api.find_examples",
    "FluxIRError": "flux_ir.errors",
    "Intervention": "flux_ir.recording.intervention",
    "label_features": "flux_ir.api.label_features",
    "LensResult": "flux_ir.api.lens",
    "load_model": "flux_ir.api.models",
    "load_sae": "flux_ir.api.export_sae",
    "MemorySink": "flux_ir.recording.recorder",
    "Note": "flux_ir.api.progress",
    "open_source": "flux_ir.activations.source",
    "MachinePlan": "flux_ir.api.plan",
    "plan": "flux_ir.api.plan",
    "PlannedSetting": "flux_ir.api.plan",
    "play": "flux_ir.playing.server",
    "PlayPage": "flux_ir.playing.server",
    "probe": "flux_ir.api.probe",
    "Probed": "flux_ir.api.probe",
    "Progress": "flux_ir.api.progress",
    "read_capture": "flux_ir.api.lens",
    "read_features": "flux_ir.api.features",
    "read_lens": "flux_ir.api.lens",
    "Recorder": "flux_ir.recording.recorder",
    "run_study": "flux_ir.api.study",
    "sample": "flux_ir.api.models",
    "score_concepts": "flux_ir.api.score_concepts",
    "ScoredConcepts": "flux_ir.api.score_concepts",
    "ScoredSteering": "flux_ir.api.score_steering",
    "score_features": "flux_ir.api.score_features",
    "score_steering": "flux_ir.api.score_steering",
    "select_features": "flux_ir.api.select_features",
    "Site": "flux_ir.sites",
    "spliced": "flux_ir.sae.evaluation.splice",
    "steer": "flux_ir.api.steer",
    "Steered": "flux_ir.api.steer",
    "Studied": "flux_ir.api.study",
    "Edit": "flux_ir.steering.edits",
    "read_edits": "flux_ir.steering.edits",
    "save_edits": "flux_ir.steering.edits",
    "Region": "flux_ir.steering.regions",
    "text_lens": "flux_ir.api.text_lens",
    "TextLensResult": "flux_ir.api.text_lens",
    "train_lens": "flux_ir.api.train_lens",
    "TrainedLens": "flux_ir.api.train_lens",
    "train_sae": "flux_ir.api.train_sae",
    "TextRecorder": "flux_ir.recording.recorder",
    "Trained": "flux_ir.api.train_sae",
    "TrainingRow": "flux_ir.api.train_sae",
    "transfer": "flux_ir.api.transfer",
    "Transferred": "flux_ir.api.transfer",
    "Visualization": "flux_ir.api.visualize",
}

__all__ = [
    "Atlas",
    "AttentionMaps",
    "Attributed",
    "Begun",
    "CaptureResult",
    "ComparedModels",
    "Comparison",
    "Demonstrated",
    "DescribedWeights",
    "DrawnFeatures",
    "Edit",
    "EvaluatedSAE",
    "ExportedSAE",
    "Features",
    "FluxIRError",
    "Intervention",
    "LensResult",
    "MachinePlan",
    "MemorySink",
    "Note",
    "PlannedSetting",
    "PlayPage",
    "Probed",
    "Progress",
    "QuantizedComparison",
    "Recorder",
    "Region",
    "ScoredConcepts",
    "ScoredSteering",
    "Site",
    "Steered",
    "Studied",
    "TextLensResult",
    "TextRecorder",
    "Trained",
    "TrainedLens",
    "TrainingRow",
    "Transferred",
    "Visualization",
    "ablate",
    "analyse_features",
    "attention_maps",
    "attribute",
    "capture",
    "collect",
    "collect_clip",
    "compare_features",
    "compare_models",
    "compare_quantized",
    "convert_collection",
    "create_visualization",
    "decode",
    "demonstrate",
    "describe_weights",
    "draw_features",
    "encode",
    "encode_prompt",
    "evaluate_sae",
    "explore",
    "explore_features",
    "export",
    "export_features",
    "export_sae",
    "find_examples",
    "label_features",
    "load_model",
    "load_sae",
    "open_source",
    "plan",
    "play",
    "probe",
    "read_capture",
    "read_edits",
    "read_features",
    "read_lens",
    "run_study",
    "sample",
    "save_edits",
    "score_concepts",
    "score_features",
    "score_steering",
    "select_features",
    "spliced",
    "steer",
    "text_lens",
    "train_lens",
    "train_sae",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'flux_ir' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    own = {name for name in globals() if name.startswith("__")}
    return sorted({*own, *__all__})
