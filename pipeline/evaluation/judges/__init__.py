"""Judges that do not share training: how well an image fits a caption, told by each on its own.

specs = judge_specs(recipe.evaluate.judges, trained=..., caption_encoder=..., cache=...)
judge = specs[0].load(device)
judge.embed_images(images) @ judge.embed_captions(captions).T
"""

from pipeline.evaluation.judges.independence import check_independent
from pipeline.evaluation.judges.judge import Judge
from pipeline.evaluation.judges.spec import JudgeSpec, judge_specs
from pipeline.evaluation.judges.trained import AlignerJudge, ImageNetJudge

__all__ = [
    "AlignerJudge",
    "ImageNetJudge",
    "Judge",
    "JudgeSpec",
    "check_independent",
    "judge_specs",
]
