"""Operations that run in place of several plain ones."""
