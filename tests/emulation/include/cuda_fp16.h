// On the host the half types come with cuda_on_host.h.
