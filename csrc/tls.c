// SPDX-License-Identifier: LGPL-2.0-or-later
/*
 * The version of the GnuTLS that libnbd uses and, in a self-contained wheel, the authorities that
 * GnuTLS trusts.  Its functions are declared here, so that a build needs no headers of GnuTLS.
 */
#include "nbdshim.h"

#include <stdlib.h>
#include <unistd.h>

/* NULL if libnbd is built without TLS. */
extern const char *gnutls_check_version(const char *oldest) __attribute__((weak));

const char *nbdshim_gnutls(void)
{
    return gnutls_check_version ? gnutls_check_version(NULL) : NULL;
}

#ifdef NBDSHIM_BUNDLED

#ifndef NBDSHIM_ROOT
#define NBDSHIM_ROOT "" /* tests put a folder in front of the places */
#endif

enum { PEM = 1, FILE_ERROR = -64 }; /* GNUTLS_X509_FMT_PEM, GNUTLS_E_FILE_ERROR */

struct gnutls_certificate_credentials_st;
int gnutls_certificate_set_x509_trust_file(struct gnutls_certificate_credentials_st *credentials,
                                           const char *file, int format);
int gnutls_certificate_set_x509_system_trust(struct gnutls_certificate_credentials_st *credentials);

/* Where distributions keep the certificates of the authorities that they trust. */
static const char *const places[] = {
    NBDSHIM_ROOT "/etc/ssl/certs/ca-certificates.crt", /* Debian, Arch, Alpine */
    NBDSHIM_ROOT "/etc/pki/tls/certs/ca-bundle.crt",   /* Fedora, CentOS */
    NBDSHIM_ROOT
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", /* the same without symbolic links */
    NBDSHIM_ROOT "/etc/ssl/ca-bundle.pem",               /* openSUSE */
    NBDSHIM_ROOT "/etc/ssl/cert.pem",                    /* Alpine without a package */
};

/*
 * Trust the certificate authorities of this system.  This function replaces GnuTLS's own, which
 * knows only the place used by the system that it was built for; libnbd calls this one because the
 * shim is loaded first.  SSL_CERT_FILE has precedence.  Returns the number of certificates, or a
 * negative GnuTLS error.
 */
int gnutls_certificate_set_x509_system_trust(struct gnutls_certificate_credentials_st *credentials)
{
    const char *file = secure_getenv("SSL_CERT_FILE");
    for (size_t i = 0; (!file || !*file) && i < sizeof places / sizeof *places; i++)
        if (access(places[i], R_OK) == 0)
            file = places[i];
    if (!file || !*file)
        return FILE_ERROR;
    return gnutls_certificate_set_x509_trust_file(credentials, file, PEM);
}

#endif
