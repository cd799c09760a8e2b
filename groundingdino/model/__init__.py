"""The detector. Read `detector.py` first."""

from groundingdino.model.denoising import DenoisingNoise, DenoisingOutput
from groundingdino.model.detector import DetectorOutput, GroundingDINO, build_detector
from groundingdino.model.image_tokens import ImageTokens

__all__ = ["DenoisingNoise", "DenoisingOutput", "DetectorOutput", "GroundingDINO", "ImageTokens", "build_detector"]
