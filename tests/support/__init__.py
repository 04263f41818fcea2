"""What tests share: servers, handles, programs, and what must not be left behind."""
