"""Learning Deconvolution Network for Semantic Segmentation (Noh, Hong, Han, ICCV 2015)."""
