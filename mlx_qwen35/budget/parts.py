"""What a memory plan is made of, for pictures."""

from mlx_qwen35.budget.plan import MemoryPlan

LABELS = ("weights", "vision encoder", "draft head", "adapters", "keys and values", "state", "working memory")


def parts(plan: MemoryPlan) -> list[tuple[str, int]]:
    """Label and bytes of each part, in the order of LABELS. They add up to `plan.image`.

    The vision encoder is unloaded before keys and values are allocated. Its part is what a first turn with an image
    takes beyond text: 0 where a long text takes more.
    """
    beyond, working = plan.image - plan.text, plan.working + plan.buffers
    sizes = (plan.weights, beyond, plan.drafts, plan.adapters, plan.kv, plan.state, working)
    return list(zip(LABELS, sizes, strict=True))
