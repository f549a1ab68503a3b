"""Operations that several islands need: augmentation and whitening."""
