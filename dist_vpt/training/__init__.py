"""One step of training, and what runs, trials and evaluations are made of."""
