"""The numbers behind the answers to a question: imputation, novelty, integration."""
