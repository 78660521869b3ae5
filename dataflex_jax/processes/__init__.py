"""Several processes as one run: who they are, how they meet, and that none waits for one that is gone."""
