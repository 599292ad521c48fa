"""The computations behind answers: imputation, novelty, integration."""
