"""Fine-tuning: the upper blocks of backbones, trained with the recommender."""
