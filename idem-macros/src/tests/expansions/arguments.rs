async fn f(
    __a0: User,
    __a1: Path<u64>,
    __a2: Permit,
    __idem: ::idem_runtime::__private::Idem<
        Json<B>,
        ::idem_runtime::__private::EngineInRouterState,
    >,
) -> ::idem_runtime::__private::Guarded<u64> {
    let __policy: &'static ::idem_runtime::__private::Policy = {
        const __IDEM_POLICY: ::idem_runtime::__private::Policy = ::idem_runtime::__private::Policy::new(
                ::idem_runtime::__private::Anchor::all(
                    &[
                        ::idem_runtime::__private::Anchor::argument(),
                        ::idem_runtime::__private::Anchor::argument(),
                    ],
                ),
            )
            .scope(
                ::idem_runtime::__private::Scope::all(
                    &[
                        ::idem_runtime::__private::Scope::argument(),
                        ::idem_runtime::__private::Scope::header("X"),
                    ],
                ),
            );
        &__IDEM_POLICY
    };
    {
        #[allow(unused_imports)]
        use ::idem_runtime::__private::probe::Fallback as _;
        ::idem_runtime::__private::probe::Of::<u64>::idem_answer_is_complete();
    }
    {
        #[allow(unused_imports)]
        use ::idem_runtime::__private::transaction::Fallback as _;
        const _: () = ::idem_runtime::__private::transaction::none(
            ::idem_runtime::__private::transaction::Of::<User>::COUNT,
        );
        const _: () = ::idem_runtime::__private::transaction::none(
            ::idem_runtime::__private::transaction::Of::<Path<u64>>::COUNT,
        );
        const _: () = ::idem_runtime::__private::transaction::none(
            ::idem_runtime::__private::transaction::Of::<Permit>::COUNT,
        );
        const _: () = ::idem_runtime::__private::transaction::none(
            ::idem_runtime::__private::transaction::Of::<Json<B>>::COUNT,
        );
    }
    let (__call, __last) = match ::idem_runtime::__private::parse(__idem, __policy).await
    {
        ::core::result::Result::Ok(__parsed) => __parsed,
        ::core::result::Result::Err(__answer) => return __answer,
    };
    let mut __arguments = ::idem_runtime::__private::Arguments::new();
    {
        #[allow(unused_variables)]
        let __collect = |__arguments: &mut ::idem_runtime::__private::Arguments| {
            let user = &__a0;
            let Path(id) = &__a1;
            let _ = &__a2;
            let Json(body) = &__last;
            __arguments.push(&(body.nonce));
            __arguments.push(&((id, 1)));
            __arguments.push(&(user.tenant));
        };
        __collect(&mut __arguments);
    }
    ::idem_runtime::__private::run_parsed(
            __call,
            __arguments,
            __last,
            move |__last: Json<B>| ::idem_runtime::__private::boxed(async move {
                #[allow(
                    unreachable_code,
                    clippy::diverging_sub_expression,
                    clippy::empty_loop,
                    clippy::let_unit_value,
                    clippy::let_with_type_underscore,
                    clippy::needless_return,
                )]
                if false {
                    let __never: u64 = loop {};
                    return __never;
                }
                let __args = (__a0, __a1, __a2, __last);
                let user = __args.0;
                #[allow(unused_mut)]
                let Path(mut id) = __args.1;
                let Json(ref body) = __args.3;
                let _ = &user;
                let _ = &id;
                let _ = &body;
                #[allow(unused_braces)] { 1 }
            }),
        )
        .await
}
