"""VQT computed as its published code computes it: what the frozen stream is measured against.

B images, S image side, N tokens, Q queries of a block, A = N + Q, D width, L blocks that are read, K classes.
"""

import torch
from torch import Tensor

from dist_vpt.methods.stack import ReaderStack
from dist_vpt.methods.vqt import VQT


class PublishedVQT(VQT):
    """Queries run through every block beside the image's tokens, in one sequence and one autograd graph.

    What is trained, the features and the head are the package's; the attention is timm's own, under a mask.
    """

    def forward(self, images_B3SS: Tensor) -> Tensor:  # type: ignore[override]
        tokens_BND = self.backbone.embed(images_B3SS)
        images, tokens = tokens_BND.shape[:2]
        mask_BLQD = self.mask(images)
        queries_BLQD = (
            self.scaled_queries.expand(images, -1, -1, -1) if mask_BLQD is None else self.scaled_queries * mask_BLQD
        )
        queries_BLQD = queries_BLQD.to(tokens_BND.dtype)
        mask_AA = query_mask(tokens, queries_BLQD.shape[2]).to(tokens_BND)
        answers = []
        for number, block in enumerate(self.backbone.blocks):
            if number not in self.blocks:
                tokens_BND = block(tokens_BND)
                continue
            joined_BAD = torch.cat([tokens_BND, queries_BLQD[:, self.blocks.index(number)]], dim=1)
            tokens_BND, answer_BQD = block(joined_BAD, attn_mask=mask_AA).tensor_split([tokens], dim=1)
            answers.append(answer_BQD)
        pooled_BD = self.backbone.pool(self.backbone.norm(tokens_BND))
        return self.classify(self._features(ReaderStack.of([self]), pooled_BD, answers).squeeze(1))


def query_mask(tokens: int, queries: int) -> Tensor:
    """Added to the scores [A, A]: all see the image's tokens, and nobody sees the queries, which come last."""
    mask_AA = torch.zeros(tokens + queries, tokens + queries)
    mask_AA[:, tokens:] = float("-inf")
    return mask_AA
