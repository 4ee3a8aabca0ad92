// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func identityCommand() *cobra.Command {
	var audience string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "identity", Short: "ask the SPIFFE Workload API who I am, as any program would", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return identify(ctx, cmd.OutOrStdout(), audience)
		},
	}
	cmd.Flags().StringVar(&audience, "audience", "", "get a JWT-SVID for it, too")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "for everything")
	return cmd
}

// identify prints what the library gets, after the library has verified it.
func identify(ctx context.Context, out io.Writer, audience string) error {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	svid, err := client.FetchX509SVID(ctx)
	if err != nil {
		return err
	}
	roots, err := client.FetchX509Bundles(ctx)
	if err != nil {
		return err
	}
	id, _, err := x509svid.Verify(svid.Certificates, roots)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "certificate", id)
	if audience == "" {
		return nil
	}
	token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		return err
	}
	said, err := client.ValidateJWTSVID(ctx, token.Marshal(), audience)
	if err != nil {
		return err
	}
	keys, err := client.FetchJWTBundles(ctx)
	if err != nil {
		return err
	}
	if _, err := jwtsvid.ParseAndValidate(token.Marshal(), keys, []string{audience}); err != nil {
		return err
	}
	fmt.Fprintln(out, "token", said.ID, "for", said.Audience)
	return nil
}
