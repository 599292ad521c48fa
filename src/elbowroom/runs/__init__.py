"""Operations on a run: fit, audit, advice, comparison, improvement."""
