"""What tests share: servers, handles, programs, signal handlers, and measurements of leaks."""
